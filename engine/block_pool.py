"""The ledger of KV blocks: who owns which, and until when. Pure.

Kept true: a block is free or has exactly one owner (P5); an owner holds one lease, with a deadline;
`release` is the only way back. Free blocks are handed out in the order in which they became free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass


class NotEnoughBlocks(Exception):
    """Fewer blocks are free than were asked for."""


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // block_size)


@dataclass(frozen=True, slots=True)
class Lease:
    """The blocks of one owner, in the order of its tokens."""

    blocks: tuple[int, ...]
    deadline: float


class BlockPool:
    """`total` blocks, numbered from 0."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError("a pool has at least one block")
        self.total = total
        self._free = deque(range(total))
        self._leases: dict[Hashable, Lease] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def leased(self) -> int:
        return self.total - len(self._free)

    def lease(self, owner: Hashable, count: int, deadline: float) -> tuple[int, ...]:
        """Give `count` free blocks to a new owner. Raises `NotEnoughBlocks`, changing nothing."""
        if owner in self._leases:
            raise ValueError(f"{owner} holds a lease already")
        if count > len(self._free):
            raise NotEnoughBlocks(f"{count} blocks wanted, {len(self._free)} free")
        blocks = tuple(self._free.popleft() for _ in range(count))
        self._leases[owner] = Lease(blocks, deadline)
        return blocks

    def release(self, owner: Hashable) -> int:
        """Take every block of `owner` back; return their number. Raises KeyError if it has none."""
        lease = self._leases.pop(owner)
        self._free.extend(lease.blocks)
        return len(lease.blocks)

    def owned(self, owner: Hashable) -> tuple[int, ...]:
        """The blocks of `owner`; empty where it holds no lease."""
        lease = self._leases.get(owner)
        return lease.blocks if lease else ()

    def check_invariants(self) -> None:
        held = [block for lease in self._leases.values() for block in lease.blocks]
        assert sorted([*held, *self._free]) == list(range(self.total)), "one owner for each block"
