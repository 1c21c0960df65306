"""What passes over a link, and in what pieces. Pure.

A unit is the KV of one layer for a span of tokens, packed as [kv_heads, 2, tokens, head_dim] (keys
then values), so that each head's bytes lie together and can be checked, split and sent apart. Spans
count tokens, not blocks: the two sides may use different block sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

PIECE_BYTES = 1 << 20
"""Largest single message on a link. gloo notices a killed peer at once in messages up to 1 MiB, and
only by timeout in larger ones (64 MiB: 7 of 7 hung)."""

MAX_UNIT_BYTES = 256 << 20
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Layout:
    """What both sides of a hand-off must have in common."""

    model_fingerprint: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int

    def head_bytes(self, tokens: int) -> int:
        """Bytes of one head's keys and values in a unit of this many tokens."""
        return 2 * tokens * self.head_dim * ELEMENT_BYTES[self.dtype]

    def unit_bytes(self, tokens: int) -> int:
        return self.kv_heads * self.head_bytes(tokens)

    def prompt_bytes(self, tokens: int) -> int:
        """Bytes of a whole prompt's KV."""
        return self.layers * self.unit_bytes(tokens)


def difference(mine: Layout, theirs: Layout) -> str | None:
    """A sentence that says where two layouts differ and what to do, or None if they are equal."""
    parts = [
        f"{field.name} {getattr(theirs, field.name)!r} there and {getattr(mine, field.name)!r} here"
        for field in fields(Layout)
        if getattr(mine, field.name) != getattr(theirs, field.name)
    ]
    if not parts:
        return None
    return "the nodes differ in " + ", ".join(parts) + "; start both with the same model and dtype"


@dataclass(frozen=True, slots=True)
class Unit:
    """One layer's KV for the prompt's tokens [start, stop)."""

    layer: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def pieces(total_bytes: int) -> Iterator[tuple[int, int]]:
    """Split a unit into byte ranges of at most `PIECE_BYTES`, in order."""
    for start in range(0, total_bytes, PIECE_BYTES):
        yield start, min(start + PIECE_BYTES, total_bytes)


class Coverage:
    """Which tokens of each layer have arrived. Units of a layer come in order, without a gap."""

    def __init__(self, layers: int, tokens: int) -> None:
        self._tokens = tokens
        self._next = [0] * layers

    def add(self, unit: Unit) -> bool:
        """Take a unit in; False if it is not the next of its layer or reaches past the prompt."""
        if not 0 <= unit.layer < len(self._next):
            return False
        if unit.start != self._next[unit.layer] or not unit.start < unit.stop <= self._tokens:
            return False
        self._next[unit.layer] = unit.stop
        return True

    @property
    def complete(self) -> bool:
        return all(done == self._tokens for done in self._next)
