"""What the prefix cache stores and removes, numbered, for whoever keeps an index of it. Pure.

Kept true: numbers rise by one; a reader that has every event from a snapshot on knows exactly what
the cache holds. The log keeps the latest events only: a reader that fell behind takes a new
snapshot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from baton.block_hash import BlockHash


@dataclass(frozen=True, slots=True)
class Stored:
    """A computed block can be hit. `parent` is the block before it, None for a first one."""

    block: BlockHash
    parent: BlockHash | None


@dataclass(frozen=True, slots=True)
class Removed:
    block: BlockHash


CacheEvent = Stored | Removed


@dataclass(frozen=True, slots=True)
class CacheNews:
    """Events to take in; `anew` says to forget what was held before: they are everything."""

    anew: bool
    events: tuple[CacheEvent, ...]
    next_number: int


class CacheLog:
    """The latest events. `next_number` is that of the event to come."""

    def __init__(self, most: int = 65_536) -> None:
        self._events: deque[CacheEvent] = deque(maxlen=most)
        self.next_number = 0

    def add(self, event: CacheEvent) -> None:
        self._events.append(event)
        self.next_number += 1

    def since(self, number: int) -> list[CacheEvent] | None:
        """The events from `number` on, or None where they are not all kept (or not of this log)."""
        behind = self.next_number - number
        if not 0 <= behind <= len(self._events):
            return None
        return list(islice(self._events, len(self._events) - behind, None))


def replay(held: dict[BlockHash, BlockHash | None], events: Iterable[CacheEvent]) -> None:
    """Bring an index, each block with its parent, up to date.

    Raises KeyError or ValueError where the events do not follow on what is held.
    """
    for event in events:
        match event:
            case Stored(block, parent):
                if block in held or (parent is not None and parent not in held):
                    raise ValueError(f"{event} does not follow on what is held")
                held[block] = parent
            case Removed(block):
                del held[block]
