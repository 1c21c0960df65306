"""The ledger of blocks: one owner for each block, released once, whatever the order of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool, NotEnoughBlocks, blocks_for

TOTAL = 7
OWNERS = st.sampled_from("abcd")
COUNTS = st.integers(0, TOTAL + 1)
TIMES = st.integers(0, 10).map(float)


class PoolMachine(RuleBasedStateMachine):
    """Random calls against a model: a list of free blocks, and each owner's blocks and deadline."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.free = list(range(TOTAL))
        self.held: dict[str, tuple[list[int], float]] = {}

    def take(self, count: int) -> list[int]:
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    @rule(owner=OWNERS, count=COUNTS, deadline=TIMES)
    def lease(self, owner: str, count: int, deadline: float) -> None:
        if owner in self.held:
            with pytest.raises(ValueError, match="holds a lease"):
                self.pool.lease(owner, count, deadline)
        elif count > len(self.free):
            with pytest.raises(NotEnoughBlocks):
                self.pool.lease(owner, count, deadline)
        else:
            taken = self.take(count)
            assert self.pool.lease(owner, count, deadline) == tuple(taken)
            self.held[owner] = (taken, deadline)

    @rule(owner=OWNERS, count=COUNTS)
    def extend(self, owner: str, count: int) -> None:
        if owner not in self.held:
            with pytest.raises(KeyError):
                self.pool.extend(owner, count)
        elif count > len(self.free):
            with pytest.raises(NotEnoughBlocks):
                self.pool.extend(owner, count)
        else:
            taken = self.take(count)
            assert self.pool.extend(owner, count) == tuple(taken)
            self.held[owner][0].extend(taken)

    @rule(old=OWNERS, new=OWNERS, deadline=TIMES)
    def transfer(self, old: str, new: str, deadline: float) -> None:
        if old not in self.held:
            with pytest.raises(KeyError):
                self.pool.transfer(old, new, deadline)
        elif new in self.held:
            with pytest.raises(ValueError, match="holds a lease"):
                self.pool.transfer(old, new, deadline)
        else:
            self.pool.transfer(old, new, deadline)
            self.held[new] = (self.held.pop(old)[0], deadline)

    @rule(owner=OWNERS)
    def release(self, owner: str) -> None:
        if owner not in self.held:
            with pytest.raises(KeyError):
                self.pool.release(owner)
        else:
            blocks, _ = self.held.pop(owner)
            assert self.pool.release(owner) == len(blocks)
            self.free += blocks

    @precondition(lambda self: self.held)
    @rule(now=TIMES)
    def expire(self, now: float) -> None:
        due = [owner for owner, (_, deadline) in self.held.items() if deadline <= now]
        assert self.pool.expired(now) == due

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check_invariants()
        assert (self.pool.free, self.pool.leased) == (len(self.free), TOTAL - len(self.free))
        for owner in "abcd":
            assert self.pool.owned(owner) == tuple(self.held.get(owner, ([], 0.0))[0])


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_refused_lease_changes_nothing() -> None:
    pool = BlockPool(4)
    pool.lease("a", 3, 1.0)
    with pytest.raises(NotEnoughBlocks, match="2 blocks wanted, 1 free"):
        pool.lease("b", 2, 1.0)
    assert (pool.free, pool.owned("b")) == (1, ())
    pool.lease("b", 1, 1.0)


@pytest.mark.parametrize("count", [-1, -8])
def test_a_negative_count_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="cannot be taken"):
        BlockPool(4).lease("a", count, 1.0)


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 16) == blocks
