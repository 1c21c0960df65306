"""What passes over a link, and in what pieces. Pure.

A unit is the KV of one layer for a span of tokens, packed as [kv_heads, 2, tokens, head_dim] (keys
then values), so that each head's bytes lie together and can be checked, split and sent apart. Spans
count tokens, not blocks: the two sides may use different block sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PIECE_BYTES = 1 << 20
"""Largest single message on a link. gloo notices a killed peer at once in messages up to 1 MiB, and
only by timeout in larger ones (64 MiB: 7 of 7 hung)."""

MAX_UNIT_BYTES = 256 << 20


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

    def __repr__(self) -> str:
        return f"Coverage({self._next} of {self._tokens})"

    @property
    def complete(self) -> bool:
        return all(done == self._tokens for done in self._next)
