"""The ledger of blocks: no leak, no double free, no wrong hit, whatever the order of calls."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.block_hash import BlockChain, BlockHash
from baton.cache_events import CacheLog, Removed, Stored, replay
from engine.block_pool import BlockCopy, BlockPool, NotEnoughBlocks, blocks_for

TOTAL, SIZE = 9, 2
OWNERS = st.sampled_from("abcd")
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)  # two of them: prefixes meet often
SALTS = st.sampled_from(["", "", "tenant"])
TIMES = st.integers(0, 10).map(float)


@dataclass
class Sequence:
    """A model of one owner: what it is, and how far its KV is computed."""

    salt: str
    tokens: list[int]
    computed: int
    deadline: float
    closed_at: int | None = None
    hashes: list[BlockHash] = field(default_factory=list)

    def named(self, tokens: int) -> tuple[str, tuple[int, ...]]:
        """What the block that ends with so many tokens must hold: all that came before matters."""
        return self.salt, tuple(self.tokens[:tokens])


class PoolMachine(RuleBasedStateMachine):
    """Random sequences over one pool, beside a memory that knows what was written where."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.sequences: dict[str, Sequence] = {}
        # What each slot was computed for: (salt, tokens up to and with its own), or None.
        self.memory: list[list[object]] = [[None] * SIZE for _ in range(TOTAL)]
        self.index: dict[BlockHash, BlockHash | None] = {}
        self.read = 0

    @rule(owner=OWNERS, tokens=TOKENS, salt=SALTS, deadline=TIMES)
    def arrive(self, owner: str, tokens: list[int], salt: str, deadline: float) -> None:
        hashes = BlockChain(SIZE, salt, tokens).hashes
        wanted = hashes[: (len(tokens) - 1) // SIZE]  # the last token is always computed
        prefix = wanted[: self.pool.match(wanted)]
        count = blocks_for(len(tokens), SIZE)
        if owner in self.sequences:
            with pytest.raises(ValueError, match="holds a lease"):
                self.pool.lease(owner, count, deadline, prefix)
        elif not self.pool.fits(count, prefix):
            before = self.pool.free
            with pytest.raises(NotEnoughBlocks):
                self.pool.lease(owner, count, deadline, prefix)
            assert self.pool.free == before
        else:
            blocks = self.pool.lease(owner, count, deadline, prefix)
            assert len(blocks) == count == len(set(blocks))
            hit = len(prefix) * SIZE
            self.sequences[owner] = Sequence(salt, tokens, hit, deadline, hashes=hashes)
            for block in blocks[len(prefix) :]:
                self.memory[block] = [None] * SIZE
            self.check_kv(owner)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.integers(1, 5), publish=st.booleans())
    def compute(self, data: st.DataObject, tokens: int, publish: bool) -> None:
        """Compute some more tokens, in blocks that are the owner's alone."""
        owner = data.draw(st.sampled_from(sorted(self.sequences)))
        sequence = self.sequences[owner]
        stop = min(sequence.computed + tokens, len(sequence.tokens))
        for place in range(sequence.computed, stop):
            try:
                copy = self.pool.make_writable(owner, place // SIZE)
            except NotEnoughBlocks:
                assert self.pool.free == 0
                return
            if copy is not None:
                assert copy.source != copy.target
                self.memory[copy.target] = list(self.memory[copy.source])
            block = self.pool.owned(owner)[place // SIZE]
            others = [o for o in self.sequences if o != owner and block in self.pool.owned(o)]
            assert not others, "nobody writes where another reads"
            self.memory[block][place % SIZE] = sequence.named(place + 1)
            sequence.computed = place + 1
        if publish:
            self.pool.publish(owner, sequence.hashes[: sequence.computed // SIZE])
        self.check_kv(owner)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        owner = data.draw(st.sampled_from(sorted(self.sequences)))
        sequence = self.sequences[owner]
        length = len(sequence.tokens) + len(tokens)
        more = blocks_for(length, SIZE) - len(self.pool.owned(owner))
        if more > self.pool.free:
            with pytest.raises(NotEnoughBlocks):
                self.pool.extend(owner, more)
            return
        for block in self.pool.extend(owner, more):
            self.memory[block] = [None] * SIZE
        sequence.tokens = [*sequence.tokens, *tokens]
        sequence.hashes = BlockChain(SIZE, sequence.salt, sequence.tokens).hashes

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), new=OWNERS, deadline=TIMES)
    def fork(self, data: st.DataObject, new: str, deadline: float) -> None:
        """Only whole sequences fork: as with several answers to one prompt."""
        owner = data.draw(st.sampled_from(sorted(self.sequences)))
        sequence = self.sequences[owner]
        if new in self.sequences:
            with pytest.raises(ValueError, match="holds a lease"):
                self.pool.fork(owner, new, deadline)
        elif sequence.computed == len(sequence.tokens):
            assert self.pool.fork(owner, new, deadline) == self.pool.owned(owner)
            self.sequences[new] = Sequence(
                sequence.salt,
                list(sequence.tokens),
                sequence.computed,
                deadline,
                hashes=list(sequence.hashes),
            )

    @rule(owner=OWNERS)
    def release(self, owner: str) -> None:
        if owner not in self.sequences:
            with pytest.raises(KeyError):
                self.pool.release(owner)
        else:
            blocks = self.pool.owned(owner)
            del self.sequences[owner]
            assert self.pool.release(owner) == len(blocks)

    @rule(now=TIMES)
    def expire(self, now: float) -> None:
        due = {owner for owner, sequence in self.sequences.items() if sequence.deadline <= now}
        assert set(self.pool.expired(now)) == due

    @rule()
    def follow_the_log(self) -> None:
        """Whoever replays the events holds exactly what a snapshot holds."""
        events = self.pool.log.since(self.read)
        assert events is not None
        replay(self.index, events)
        self.read = self.pool.log.next_number
        fresh: dict[BlockHash, BlockHash | None] = {}
        replay(fresh, self.pool.snapshot())
        assert self.index == fresh

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.pool.check_invariants()
        held = {block for owner in self.sequences for block in self.pool.owned(owner)}
        assert self.pool.leased == len(held)
        assert self.pool.free == TOTAL - len(held)

    @invariant()
    def every_sequence_reads_its_own_kv(self) -> None:
        for owner in self.sequences:
            self.check_kv(owner)

    def check_kv(self, owner: str) -> None:
        sequence, blocks = self.sequences[owner], self.pool.owned(owner)
        for place in range(sequence.computed):
            held = self.memory[blocks[place // SIZE]][place % SIZE]
            assert held == sequence.named(place + 1), f"{owner} reads another's token {place}"


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def cached(total: int, *chains: list[int], salt: str = "") -> BlockPool:
    """A pool in which these token lists were computed, published and let go of, in order."""
    pool = BlockPool(total)
    for tokens in chains:
        hashes = BlockChain(SIZE, salt, tokens).hashes
        prefix = hashes[: pool.match(hashes)]
        pool.lease("computing", len(hashes), 1.0, prefix)
        pool.publish("computing", hashes)
        pool.release("computing")
    return pool


def hit(pool: BlockPool, tokens: list[int], salt: str = "") -> int:
    return pool.match(BlockChain(SIZE, salt, tokens).hashes)


def test_a_prefix_is_hit_up_to_the_first_block_that_differs() -> None:
    pool = cached(8, [1, 2, 3, 4, 5, 6])
    assert hit(pool, [1, 2, 3, 4, 9, 9, 5, 6]) == 2
    assert hit(pool, [1, 2, 3]) == 1
    assert hit(pool, [9, 2, 3, 4, 5, 6]) == 0, "the same block after another start is another"


def test_a_salt_keeps_tenants_apart() -> None:
    pool = cached(8, [1, 2, 3, 4], salt="one")
    assert hit(pool, [1, 2, 3, 4], "one") == 2
    assert hit(pool, [1, 2, 3, 4], "two") == hit(pool, [1, 2, 3, 4]) == 0


def test_a_block_is_not_hit_before_it_is_computed() -> None:
    pool = BlockPool(4)
    hashes = BlockChain(SIZE, "", [1, 2, 3, 4]).hashes
    pool.lease("a", 2, 1.0)
    assert pool.match(hashes) == 0
    pool.publish("a", hashes[:1])
    assert pool.match(hashes) == 1


def test_the_least_recently_used_goes_first_and_the_end_of_a_chain_before_its_beginning() -> None:
    pool = cached(4, [1, 1, 2, 2], [3, 3, 4, 4])
    hashes = BlockChain(SIZE, "", [1, 1]).hashes
    pool.lease("touch", 1, 1.0, hashes)
    pool.release("touch")
    order = []
    chains = {"11": [1, 1], "1122": [1, 1, 2, 2], "33": [3, 3], "3344": [3, 3, 4, 4]}
    for count in range(1, 5):
        pool.lease(count, 1, 1.0)
        gone = [n for n, chain in chains.items() if hit(pool, chain) < len(chain) // SIZE]
        order += [name for name in gone if name not in order]
    assert order == ["1122", "3344", "33", "11"]


def test_blocks_in_use_are_never_evicted() -> None:
    pool = cached(3, [1, 1, 2, 2])
    pool.lease("a", 2, 1.0, BlockChain(SIZE, "", [1, 1, 2, 2]).hashes)
    pool.lease("b", 1, 1.0)
    with pytest.raises(NotEnoughBlocks, match="1 blocks wanted, 0 free"):
        pool.lease("c", 1, 1.0)
    assert hit(pool, [1, 1, 2, 2]) == 2


def test_a_prefix_takes_no_room_from_what_is_wanted_beside_it() -> None:
    """A cached block that is hit cannot be evicted for the same lease."""
    pool = cached(2, [1, 1])
    hashes = BlockChain(SIZE, "", [1, 1]).hashes
    assert pool.fits(2, hashes)
    assert not pool.fits(3, hashes)
    assert not pool.fits(2, hashes, spare=1)
    with pytest.raises(NotEnoughBlocks):
        pool.lease("a", 3, 1.0, hashes)
    assert pool.free == 2


def test_two_who_compute_the_same_publish_it_once() -> None:
    pool = BlockPool(4)
    hashes = BlockChain(SIZE, "", [1, 1, 2, 2]).hashes
    for owner in "ab":
        pool.lease(owner, 2, 1.0)
    pool.publish("a", hashes[:1])
    pool.publish("b", hashes)
    assert pool.match(hashes) == 1, "b's chain does not go on from a block that is not its own"
    pool.release("b")
    pool.publish("a", hashes)
    pool.release("a")
    assert (pool.match(hashes), pool.cached, pool.free) == (2, 2, 4)


def test_a_fork_shares_every_block_until_it_writes() -> None:
    pool = BlockPool(4)
    blocks = pool.lease("a", 2, 1.0)
    assert pool.fork("a", "b", 1.0) == blocks
    assert (pool.leased, pool.make_writable("b", 1)) == (3 - 1, BlockCopy(blocks[1], 2))
    assert pool.owned("b") == (blocks[0], 2)
    assert pool.make_writable("a", 1) is None, "it is a's alone by now"
    assert pool.release("a") == 2
    assert pool.leased == 2


def test_a_published_block_is_copied_before_it_changes() -> None:
    pool = BlockPool(4)
    hashes = BlockChain(SIZE, "", [1, 1]).hashes
    [block] = pool.lease("a", 1, 1.0)
    pool.publish("a", hashes)
    assert pool.make_writable("a", 0) == BlockCopy(block, 1)
    assert pool.match(hashes) == 1
    pool.check_invariants()


def test_a_refused_lease_changes_nothing() -> None:
    pool = BlockPool(4)
    pool.lease("a", 3, 1.0)
    with pytest.raises(NotEnoughBlocks, match="2 blocks wanted, 1 free"):
        pool.lease("b", 2, 1.0)
    assert (pool.free, pool.owned("b")) == (1, ())
    pool.lease("b", 1, 1.0)


@pytest.mark.parametrize("count", [-1, -8])
def test_a_negative_count_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="cannot"):
        BlockPool(4).lease("a", count, 1.0)


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 16) == blocks


def test_who_falls_behind_the_log_is_told_so() -> None:
    log = CacheLog(most=3)
    for number in range(5):
        log.add(Stored(bytes([number]), None))
    assert log.since(1) is None
    assert log.since(6) is None, "a number of another log"
    assert log.since(2) == [Stored(bytes([number]), None) for number in (2, 3, 4)]
    assert log.since(5) == []


def test_events_that_do_not_follow_on_the_index_are_noticed() -> None:
    held: dict[BlockHash, BlockHash | None] = {}
    with pytest.raises(ValueError, match="does not follow"):
        replay(held, [Stored(b"b", b"a")])
    replay(held, [Stored(b"a", None), Stored(b"b", b"a"), Removed(b"b")])
    assert held == {b"a": None}
