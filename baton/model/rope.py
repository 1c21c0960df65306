"""Rotary position embedding: which base, and how a model stretches it over a longer context.

Two ways of stretching are known, and both divide the angle that a token turns by: `linear` divides
every frequency alike, `llama3` only the slow ones. Any other is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from baton.errors import UnsupportedModel
from baton.model.config_fields import positive, refuse_unless
from baton.model.folder import CONFIG_FILE

_HOLDERS = ("rope_parameters", "rope_scaling")


class RopeKind(StrEnum):
    """By the names that `rope_type` has in a config."""

    LINEAR = "linear"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How much slower dimensions turn than plain rotary would have them.

    The last three are used by `llama3` alone: wavelengths are compared with the context that the
    model was first trained on, in tokens.
    """

    kind: RopeKind
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context_length: float = 8192.0

    def divisors(self, head_dim: int, theta: float) -> tuple[float, ...]:
        """What each of the head_dim / 2 frequencies is divided by, the fastest first.

        `linear` is position interpolation (Chen et al. 2023). `llama3` is `apply_scaling` in
        Meta's llama-models: wavelengths above `original / low` are divided by the factor, those
        below `original / high` are kept, and between the two the change is smooth.
        """
        if self.kind is RopeKind.LINEAR:
            return (self.factor,) * (head_dim // 2)
        return tuple(self._llama3(wavelength) for wavelength in _wavelengths(head_dim, theta))

    def _llama3(self, wavelength: float) -> float:
        turns = self.original_context_length / wavelength  # in the original context
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        return 1.0 / ((1.0 - kept) / self.factor + kept)


def _wavelengths(head_dim: int, theta: float) -> list[float]:
    """Tokens that one full turn takes, for each pair of dimensions (Su et al. 2021)."""
    return [2.0 * math.pi * theta ** (pair / head_dim) for pair in range(0, head_dim, 2)]


def rope_theta(config: Mapping[str, Any], default: float) -> float:
    """At the top level, or since transformers 5 inside `rope_parameters`."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        return positive(parameters, "rope_theta")
    return positive(config, "rope_theta", default)


def rope_scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    """What `rope_parameters` or `rope_scaling` asks for. Raises `UnsupportedModel`."""
    refuse_unless(config, "partial_rotary_factor", (None, 1, 1.0))
    found = None
    for field in _HOLDERS:
        parameters = config.get(field)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise UnsupportedModel(
                f"{CONFIG_FILE}: {field} is {parameters!r}; supported are null and an object"
            )
        refuse_unless(parameters, "partial_rotary_factor", (None, 1, 1.0))
        scaling = _scaling(config, field, parameters)
        if scaling is not None and found is not None and scaling != found:
            raise UnsupportedModel(
                f"{CONFIG_FILE}: {' and '.join(_HOLDERS)} ask for different rotary scaling; keep "
                "one of them"
            )
        found = found or scaling
    return found


def _scaling(
    config: Mapping[str, Any], field: str, parameters: Mapping[str, Any]
) -> RopeScaling | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    if kind not in tuple(RopeKind):
        raise UnsupportedModel(
            f"{CONFIG_FILE}: {field} asks for {kind!r} rotary scaling; supported are none, "
            + " and ".join(repr(str(known)) for known in RopeKind)
        )
    factor = positive(parameters, "factor")
    if kind == RopeKind.LINEAR:
        return RopeScaling(RopeKind.LINEAR, factor)
    original = "original_max_position_embeddings"
    scaling = RopeScaling(
        RopeKind.LLAMA3,
        factor,
        low_frequency_factor=positive(parameters, "low_freq_factor"),
        high_frequency_factor=positive(parameters, "high_freq_factor"),
        original_context_length=positive(
            parameters if original in parameters else config, original
        ),
    )
    if scaling.high_frequency_factor <= scaling.low_frequency_factor:
        raise UnsupportedModel(
            f"{CONFIG_FILE}: {field} has high_freq_factor {scaling.high_frequency_factor:g}, which "
            f"must be above its low_freq_factor {scaling.low_frequency_factor:g}"
        )
    return scaling
