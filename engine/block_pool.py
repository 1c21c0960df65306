"""The ledger of KV blocks: who holds which, until when, and what can be used again. Pure.

    free ──lease, extend──▶ held ──release──▶ free          what was never published
      ▲                      │ ▲
      └─eviction── cached ◀──┘ └── lease with a prefix       what was

A block whose content is computed and full can be *published* under the hash that names it and all
tokens before it (`baton.block_hash`). From then on it never changes, and a lease may begin with it.

Kept true: a block is free, cached, or in the leases that hold it, and in nothing else; an owner
holds one lease, with a deadline; `release` is the only way back, and works once. What is published
has a published predecessor, and whoever holds a block of a chain holds those before it: so a
cached block's successors are cached too, and stand before it in the order of eviction, which takes
the least recently used first. Free blocks are handed out before cached ones, in the order in which
they became free. A call that raises has changed nothing. A deadline is a time on the caller's
clock, in seconds; passing it takes nothing away, but `expired` names the owner from then on.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from baton.block_hash import BlockHash
from baton.cache_events import CacheLog, CacheNews, Removed, Stored


class NotEnoughBlocks(Exception):
    """Fewer blocks can be had than were asked for."""


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // block_size)


@dataclass(slots=True)
class _Lease:
    """The blocks of one owner, in the order of its tokens."""

    blocks: list[int]
    deadline: float
    published: int  # so many of the first are in the cache under the owner's own hashes
    closed: bool = False  # another block bears the next hash: the chain cannot be published on


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The content of block `source` has to be copied to block `target`."""

    source: int
    target: int


class BlockPool:
    """`total` blocks, numbered from 0. An owner is anything hashable: a `Ticket` in the nodes."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError("a pool has at least one block")
        self.total = total
        self.log = CacheLog()
        """What was published and evicted."""
        self._free = deque(range(total))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._holders = [0] * total
        self._leases: dict[Hashable, _Lease] = {}
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._parent_of: dict[BlockHash, BlockHash | None] = {}

    @property
    def free(self) -> int:
        """Blocks that a lease can have: free ones, and cached ones that nobody holds."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and a prefix can hit."""
        return len(self._cached)

    @property
    def leased(self) -> int:
        return self.total - self.free

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """How many of the first of these are in the cache."""
        for count, block in enumerate(hashes):
            if block not in self._block_of:
                return count
        return len(hashes)

    def fits(self, count: int, prefix: Sequence[BlockHash] = (), spare: int = 0) -> bool:
        """Whether `lease` would succeed with these and leave `spare` blocks to be had."""
        idle = sum(self._block_of[block] in self._cached for block in prefix)
        return count - len(prefix) + spare <= self.free - idle

    def lease(
        self, owner: Hashable, count: int, deadline: float, prefix: Sequence[BlockHash] = ()
    ) -> tuple[int, ...]:
        """Give `count` blocks to a new owner, the first of them those cached under `prefix`.

        Raises `NotEnoughBlocks`, KeyError where a block of the prefix is not in the cache, or
        ValueError where `owner` holds a lease already.
        """
        self._require_new(owner)
        if count < len(prefix):
            raise ValueError(f"{count} blocks cannot begin with {len(prefix)}")
        shared = [self._block_of[block] for block in prefix]
        if not self.fits(count, prefix):
            raise NotEnoughBlocks(f"{count} blocks wanted, {self.free} free")
        for block in shared:
            self._hold(block)
        lease = _Lease([*shared, *self._take(count - len(shared))], deadline, len(shared))
        self._leases[owner] = lease
        return tuple(lease.blocks)

    def extend(self, owner: Hashable, count: int) -> tuple[int, ...]:
        """Give an owner `count` more blocks, behind those it has; return the new ones.

        Raises `NotEnoughBlocks`, or KeyError where `owner` holds no lease.
        """
        lease = self._leases[owner]
        blocks = self._take(count)
        lease.blocks += blocks
        return blocks

    def publish(self, owner: Hashable, hashes: Sequence[BlockHash]) -> None:
        """Put the owner's first blocks, computed and full, into the cache under these hashes.

        Hashes that were published before are taken as they are. Where a hash is in the cache
        already, on another block, that block stays: the rest of this chain is not published.
        """
        lease = self._leases[owner]
        assert len(hashes) <= len(lease.blocks), "a hash for a block that is not held"
        while not lease.closed and lease.published < len(hashes):
            name, block = hashes[lease.published], lease.blocks[lease.published]
            if name in self._block_of:
                lease.closed = True
                return
            assert block not in self._hash_of, "a block has one name"
            parent = hashes[lease.published - 1] if lease.published else None
            self._block_of[name], self._hash_of[block] = block, name
            self._parent_of[name] = parent
            self.log.add(Stored(name, parent))
            lease.published += 1

    def fork(self, owner: Hashable, new_owner: Hashable, deadline: float) -> tuple[int, ...]:
        """Let a new owner hold the same blocks, all of them; return these.

        Either must make a block its own (`make_writable`) before it writes there. Raises KeyError
        where `owner` holds no lease, ValueError where `new_owner` holds one.
        """
        lease = self._leases[owner]
        self._require_new(new_owner)
        for block in lease.blocks:
            self._hold(block)
        self._leases[new_owner] = _Lease(
            list(lease.blocks), deadline, lease.published, lease.closed
        )
        return tuple(lease.blocks)

    def make_writable(self, owner: Hashable, index: int) -> BlockCopy | None:
        """Make the owner's block at `index` its own (copy-on-write); None if it is already.

        A block that others hold, or that is published, is replaced in the lease by a new one, into
        which the caller has to copy it. Raises `NotEnoughBlocks`.
        """
        lease = self._leases[owner]
        source = lease.blocks[index]
        if self._holders[source] == 1 and source not in self._hash_of:
            return None
        assert lease.published <= index + 1, "nothing published follows on a block that changes"
        [target] = self._take(1)
        lease.blocks[index] = target
        lease.published = min(lease.published, index)
        self._let_go(source)
        return BlockCopy(source, target)

    def release(self, owner: Hashable) -> int:
        """Take every block of `owner` back; return their number. Raises KeyError if it has none."""
        lease = self._leases.pop(owner)
        for block in reversed(lease.blocks):  # the end of a chain is evicted before its beginning
            self._let_go(block)
        return len(lease.blocks)

    def owned(self, owner: Hashable) -> tuple[int, ...]:
        """The blocks of `owner`; empty where it holds no lease."""
        lease = self._leases.get(owner)
        return tuple(lease.blocks) if lease else ()

    def expired(self, now: float) -> list[Hashable]:
        """Owners whose deadline has come, in the order in which they became owners."""
        return [owner for owner, lease in self._leases.items() if lease.deadline <= now]

    def snapshot(self) -> list[Stored]:
        """Everything that can be hit, predecessors first: what replaying the whole log gives."""
        ordered: dict[BlockHash, None] = {}
        for name in self._block_of:
            chain = []
            step: BlockHash | None = name
            while step is not None and step not in ordered:
                chain.append(step)
                step = self._parent_of[step]
            ordered.update(dict.fromkeys(reversed(chain)))
        return [Stored(name, self._parent_of[name]) for name in ordered]

    def news(self, number: int | None) -> CacheNews:
        """What was stored and removed from this event on; all that is held where that is lost."""
        events = None if number is None else self.log.since(number)
        if events is None:
            return CacheNews(True, tuple(self.snapshot()), self.log.next_number)
        return CacheNews(False, tuple(events), self.log.next_number)

    def check_invariants(self) -> None:
        """Assert that every block is where it may be, and nothing is lost or counted twice."""
        held = Counter(block for lease in self._leases.values() for block in lease.blocks)
        assert [held[block] for block in range(self.total)] == self._holders
        idle = [*self._free, *self._cached]
        assert sorted([*held, *idle]) == list(range(self.total)), "each block is in one place"
        assert not set(self._free) & self._hash_of.keys(), "a free block has no name"
        assert self._cached.keys() <= self._hash_of.keys()
        assert {block: name for name, block in self._block_of.items()} == self._hash_of
        assert self._parent_of.keys() == self._block_of.keys()
        order = {block: place for place, block in enumerate(self._cached)}
        for name, parent in self._parent_of.items():
            if parent is None:
                continue
            assert parent in self._block_of, "a chain has no gap"
            before, block = self._block_of[parent], self._block_of[name]
            assert self._holders[before] >= self._holders[block]
            if before in order:
                assert order[block] < order[before], "a chain is evicted from its end"
        for lease in self._leases.values():
            assert all(block in self._hash_of for block in lease.blocks[: lease.published])

    def _require_new(self, owner: Hashable) -> None:
        if owner in self._leases:
            raise ValueError(f"{owner} holds a lease already")

    def _take(self, count: int) -> tuple[int, ...]:
        if count < 0:
            raise ValueError(f"{count} blocks cannot be taken")
        if count > self.free:
            raise NotEnoughBlocks(f"{count} blocks wanted, {self.free} free")
        while len(self._free) < count:
            self._evict()
        taken = tuple(self._free.popleft() for _ in range(count))
        for block in taken:
            self._holders[block] = 1
        return taken

    def _evict(self) -> None:
        block, _ = self._cached.popitem(last=False)
        name = self._hash_of.pop(block)
        del self._block_of[name], self._parent_of[name]
        self.log.add(Removed(name))
        self._free.append(block)

    def _hold(self, block: int) -> None:
        self._holders[block] += 1
        self._cached.pop(block, None)

    def _let_go(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)
