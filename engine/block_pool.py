"""The ledger of KV blocks: who owns which, and until when. Pure.

    free ──lease, extend──▶ owned ──release──▶ free
                             └─ transfer: the same blocks, a new owner

Kept true: a block is free or has exactly one owner (P5); an owner holds one lease, with a deadline;
`release` is the only way back, and works once. Free blocks are handed out in the order in which
they became free. A call that raises has changed nothing. A deadline is a time on the caller's
clock, in seconds; passing it takes nothing away, but `expired` names the owner from then on.
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
    """`total` blocks, numbered from 0. An owner is anything hashable: a `Ticket` in the nodes."""

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
        """Give `count` free blocks to a new owner.

        Raises `NotEnoughBlocks`, or ValueError where `owner` holds a lease already.
        """
        self._require_new(owner)
        blocks = self._take(count)
        self._leases[owner] = Lease(blocks, deadline)
        return blocks

    def extend(self, owner: Hashable, count: int) -> tuple[int, ...]:
        """Give an owner `count` more blocks, behind those it has; return the new ones.

        Raises `NotEnoughBlocks`, or KeyError where `owner` holds no lease.
        """
        lease = self._leases[owner]
        blocks = self._take(count)
        self._leases[owner] = Lease(lease.blocks + blocks, lease.deadline)
        return blocks

    def transfer(self, old_owner: Hashable, new_owner: Hashable, deadline: float) -> None:
        """Make `new_owner` the owner of every block of `old_owner`, until `deadline`.

        Raises KeyError where `old_owner` holds no lease, ValueError where `new_owner` holds one.
        """
        lease = self._leases[old_owner]
        self._require_new(new_owner)
        del self._leases[old_owner]
        self._leases[new_owner] = Lease(lease.blocks, deadline)

    def release(self, owner: Hashable) -> int:
        """Take every block of `owner` back; return their number. Raises KeyError if it has none."""
        lease = self._leases.pop(owner)
        self._free.extend(lease.blocks)
        return len(lease.blocks)

    def owned(self, owner: Hashable) -> tuple[int, ...]:
        """The blocks of `owner`; empty where it holds no lease."""
        lease = self._leases.get(owner)
        return lease.blocks if lease else ()

    def expired(self, now: float) -> list[Hashable]:
        """Owners whose deadline has come, in the order in which they became owners."""
        return [owner for owner, lease in self._leases.items() if lease.deadline <= now]

    def check_invariants(self) -> None:
        """Assert that every block is in exactly one place."""
        held = [block for lease in self._leases.values() for block in lease.blocks]
        assert sorted([*held, *self._free]) == list(range(self.total)), "one owner for each block"

    def _require_new(self, owner: Hashable) -> None:
        if owner in self._leases:
            raise ValueError(f"{owner} holds a lease already")

    def _take(self, count: int) -> tuple[int, ...]:
        if count < 0:
            raise ValueError(f"{count} blocks cannot be taken")
        if count > len(self._free):
            raise NotEnoughBlocks(f"{count} blocks wanted, {len(self._free)} free")
        return tuple(self._free.popleft() for _ in range(count))
