"""How one field of a `config.json` is read: checked, and refused by name where it is not right.

Everything here raises `UnsupportedModel` with the field, what was found and what would do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from baton.errors import UnsupportedModel
from baton.model.folder import CONFIG_FILE


def count(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """A whole number of at least 1. A field that is absent or null is the default."""
    value = config.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"{CONFIG_FILE}: {field} is {value!r} and must be a whole number")
    return value


def whole(config: Mapping[str, Any], field: str, default: int) -> int:
    """A whole number from 0 on. A field that is absent or null is the default."""
    value = config.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UnsupportedModel(
            f"{CONFIG_FILE}: {field} is {value!r} and must be a whole number from 0 on"
        )
    return value


def positive(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """A number above 0."""
    value = config.get(field, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UnsupportedModel(f"{CONFIG_FILE}: {field} is {value!r} and must be above 0")
    return float(value)


def switch(config: Mapping[str, Any], field: str, default: bool = False) -> bool:
    """True or false. A field that is absent or null is the default."""
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UnsupportedModel(f"{CONFIG_FILE}: {field} is {value!r} and must be true or false")
    return value


def numbers(config: Mapping[str, Any], field: str) -> tuple[int, ...]:
    """A list of whole numbers from 0 on; one that is absent or null is empty."""
    value = config.get(field)
    items = [] if value is None else value
    if not isinstance(items, list) or not all(
        isinstance(item, int) and item >= 0 for item in items
    ):
        raise UnsupportedModel(
            f"{CONFIG_FILE}: {field} is {value!r} and must be a list of whole numbers"
        )
    return tuple(items)


def token_ids(value: Any, field: str) -> tuple[int, ...]:
    """One token id or a list of them."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and item >= 0 for item in ids):
        raise UnsupportedModel(f"{CONFIG_FILE}: {field} is {value!r}, which are no token ids")
    return tuple(ids)


def refuse_unless(config: Mapping[str, Any], field: str, supported: tuple[Any, ...]) -> None:
    """Raise where the field asks for something else than what is supported."""
    found = config.get(field)
    if found not in supported:
        shown = " or ".join(repr(value) for value in supported if value is not None) or "null"
        raise UnsupportedModel(f"{CONFIG_FILE}: {field} is {found!r}; supported is {shown}")
