"""What a prefill node decides: every leg ends once, and its blocks outlive whatever uses them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.errors import Cancelled, EngineFailed, LinkLost
from baton.ids import Ticket
from baton.leg_events import Cancel, CancelHandOff, Fail, Finish, Released, StepFailed
from baton.sampling import FinishReason, StopParams
from engine.block_pool import BlockPool
from prefill.events import (
    Action,
    Arrive,
    BeginHandOff,
    Chunk,
    EndHandOff,
    Event,
    HandOffEnded,
    StepDone,
    Token,
)
from prefill.scheduler import LegState, Limits, PrefillScheduler

BLOCK, CHUNK, EOS = 4, 6, 2
A, B, C = (Ticket(name, 0, 1, 2) for name in "abc")
GONE = Cancelled("the client left")
BROKEN = EngineFailed("the step raised")
LOST = LinkLost("the peer went away")
STEP_S = 0.5


def make(blocks: int = 4, max_waiting: int = 2, step_tokens: int = CHUNK) -> PrefillScheduler:
    limits = Limits(step_tokens, max_waiting, age_limit_s=5.0)
    return PrefillScheduler(BlockPool(blocks), BLOCK, limits, (EOS,))


def prompt_of(ticket: Ticket, tokens: int) -> tuple[int, ...]:
    """A prompt that shares no block with another's."""
    return tuple(1000 * ord(ticket.request_id[-1]) + place for place in range(tokens))


def arrive(
    ticket: Ticket, tokens: int = 8, deadline: float = 100.0, due: float = 10.0, **stop: int
) -> Arrive:
    stops = StopParams(**{"max_tokens": 10, **stop})
    return Arrive(ticket, prompt_of(ticket, tokens), stops, due, deadline)


def tell(scheduler: PrefillScheduler, event: Event, now: float = 0.0) -> list[Action]:
    return scheduler.handle(event, now)


def step(scheduler: PrefillScheduler, now: float = 0.0) -> list[Chunk]:
    chunks = scheduler.next_step(now)
    assert chunks, "there is something to compute"
    return chunks


def done(chunks: list[Chunk], token_id: int = 50, seconds: float = STEP_S) -> StepDone:
    return StepDone({chunk.ticket: token_id for chunk in chunks if chunk.last}, seconds)


def compute(scheduler: PrefillScheduler, token_id: int = 50, now: float = 0.0) -> list[Action]:
    """Run one step; the actions it leads to."""
    return tell(scheduler, done(step(scheduler, now), token_id), now)


def computed(**stop: int) -> PrefillScheduler:
    """A scheduler whose one leg, A, has computed its prompt and is handing off."""
    scheduler = make()
    tell(scheduler, arrive(A, 4, **stop))
    compute(scheduler)
    return scheduler


def test_a_leg_computes_hands_off_and_is_released() -> None:
    scheduler = make()
    assert tell(scheduler, arrive(A, 8)) == [BeginHandOff(A, (0, 1), 0)]
    chunks = step(scheduler)
    assert chunks == [Chunk(A, 0, 6, (0, 1), first=True, last=False)]
    assert tell(scheduler, done(chunks)) == []
    chunks = step(scheduler)
    assert chunks == [Chunk(A, 6, 8, (0, 1), first=False, last=True)]
    assert tell(scheduler, done(chunks)) == [Token(A, 50), EndHandOff(A, 50)]
    assert scheduler.next_step(0.0) == []
    assert tell(scheduler, HandOffEnded(A, None)) == [Released(A)]
    assert scheduler.tickets() == []


def served(scheduler: PrefillScheduler, now: float = 0.0) -> list[list[tuple[Ticket, int, int]]]:
    """The spans of every step until nothing is left to compute."""
    steps = []
    while chunks := scheduler.next_step(now):
        steps.append([(chunk.ticket, chunk.start, chunk.stop) for chunk in chunks])
        tell(scheduler, done(chunks), now)
    return steps


def test_a_step_packs_several_prompts() -> None:
    scheduler = make(blocks=8, step_tokens=16)
    for ticket, tokens in ((A, 7), (B, 3), (C, 9)):
        tell(scheduler, arrive(ticket, tokens))
    assert served(scheduler) == [[(A, 0, 7), (B, 0, 3), (C, 0, 6)], [(C, 6, 9)]]


def test_a_sliver_of_a_prompt_is_not_computed_for_its_own_sake() -> None:
    """B waits for the next step rather than have two tokens of it in this one; C is whole."""
    scheduler = make(blocks=16, step_tokens=16)
    for ticket, tokens in ((A, 14), (B, 12), (C, 2)):
        tell(scheduler, arrive(ticket, tokens))
    assert served(scheduler) == [[(A, 0, 14), (C, 0, 2)], [(B, 0, 12)]]


def test_the_least_slack_goes_first() -> None:
    scheduler = make(blocks=8)
    tell(scheduler, arrive(A, 6, due=3.0))
    tell(scheduler, arrive(B, 6, due=1.0))
    tell(scheduler, arrive(C, 6, due=2.0))
    assert [chunk.ticket for chunk in step(scheduler)] == [B]


def test_what_a_prompt_still_takes_counts_against_its_slack() -> None:
    """At half a second for six tokens, A's eighteen need a second more than B's six."""
    scheduler = make(blocks=12)
    tell(scheduler, arrive(C, 6))
    compute(scheduler)
    tell(scheduler, arrive(B, 6, due=2.0))
    tell(scheduler, arrive(A, 18, due=2.9))
    assert [chunk.ticket for chunk in step(scheduler)] == [A]


def test_a_leg_that_has_waited_too_long_goes_before_more_urgent_ones() -> None:
    scheduler = make(blocks=8)
    tell(scheduler, arrive(A, 6, due=50.0), now=0.0)
    tell(scheduler, arrive(B, 6, due=6.0), now=4.0)
    assert [chunk.ticket for chunk in step(scheduler, now=4.9)] == [B]
    tell(scheduler, StepFailed(BROKEN), now=4.9)
    tell(scheduler, arrive(C, 6, due=6.0), now=5.0)
    assert [chunk.ticket for chunk in step(scheduler, now=5.0)] == [A]


def test_urgency_decides_who_gets_blocks_too() -> None:
    scheduler = make(blocks=2)
    tell(scheduler, arrive(A, 8))
    tell(scheduler, arrive(B, 8, due=9.0))
    tell(scheduler, arrive(C, 8, due=1.0))
    tell(scheduler, Cancel(A, GONE))
    [_, begin] = tell(scheduler, HandOffEnded(A, GONE))
    assert begin == BeginHandOff(C, (1, 0), 0)


def shared(tokens: int, *last: int) -> Arrive:
    """A prompt of which another, that was computed, has the first eight tokens."""
    prompt = (*prompt_of(A, 8), *last)[:tokens]
    return Arrive(B, prompt, StopParams(10), 10.0, 100.0)


def after_a(tokens: int = 8) -> PrefillScheduler:
    """A scheduler that has computed A's prompt and let go of it."""
    scheduler = make(blocks=6, step_tokens=8)
    tell(scheduler, arrive(A, tokens))
    compute(scheduler)
    tell(scheduler, HandOffEnded(A, None))
    return scheduler


def test_a_prompt_begins_with_what_the_cache_has_of_it() -> None:
    scheduler = after_a()
    [begin] = tell(scheduler, shared(10, 7, 8))
    assert isinstance(begin, BeginHandOff)
    assert begin.cached_tokens == 8
    [chunk] = step(scheduler)
    assert (chunk.start, chunk.stop, chunk.first, chunk.last) == (8, 10, True, True)
    assert (scheduler.cache_queries, scheduler.cache_hits) == (18, 8)


def test_a_prompt_that_is_all_there_still_computes_its_last_token() -> None:
    scheduler = after_a()
    [begin] = tell(scheduler, shared(8))
    assert isinstance(begin, BeginHandOff)
    assert begin.cached_tokens == 4, "whole blocks only, and not that of the last token"
    assert compute(scheduler) == [Token(B, 50), EndHandOff(B, 50)]


def test_a_block_that_is_not_computed_yet_is_not_hit() -> None:
    scheduler = make(blocks=6)
    tell(scheduler, arrive(A, 8))
    [begin] = tell(scheduler, shared(8))
    assert begin == BeginHandOff(B, (2, 3), 0)
    compute(scheduler)
    tell(scheduler, Cancel(B, GONE))
    [_, *_] = tell(scheduler, HandOffEnded(B, GONE))
    [begin] = tell(scheduler, shared(8))
    assert isinstance(begin, BeginHandOff)
    assert begin.cached_tokens == 4, "A's first block is computed, its second is not"


def test_a_salt_keeps_tenants_apart() -> None:
    scheduler = after_a()
    event = shared(8)
    salted = Arrive(B, event.prompt, event.stop, event.due, event.deadline, "another tenant")
    [begin] = tell(scheduler, salted)
    assert isinstance(begin, BeginHandOff)
    assert begin.cached_tokens == 0


def test_a_leg_waits_until_blocks_are_free() -> None:
    scheduler = make(blocks=2)
    tell(scheduler, arrive(A, 8))
    assert tell(scheduler, arrive(B, 4)) == []
    assert scheduler.count(LegState.WAITING) == 1
    assert tell(scheduler, Cancel(A, GONE)) == [CancelHandOff(A, GONE)]
    assert tell(scheduler, HandOffEnded(A, GONE)) == [Released(A), BeginHandOff(B, (1,), 0)]


def test_a_small_leg_does_not_overtake_a_big_one() -> None:
    """Else a stream of small prompts would starve a big one for ever (P1)."""
    scheduler = make(blocks=3)
    tell(scheduler, arrive(A, 8))
    tell(scheduler, arrive(B, 12))
    assert tell(scheduler, arrive(C, 4)) == []


def test_a_full_queue_refuses_at_once() -> None:
    scheduler = make(blocks=1, max_waiting=1)
    for ticket in (A, B):
        tell(scheduler, arrive(ticket, 4))
    [fail, released] = tell(scheduler, arrive(C, 4))
    assert isinstance(fail, Fail)
    assert fail.error.code == "RESOURCE_EXHAUSTED"
    assert released == Released(C)
    assert scheduler.tickets() == [A, B]


def test_no_queue_at_all_still_admits_what_fits() -> None:
    scheduler = make(blocks=1, max_waiting=0)
    assert tell(scheduler, arrive(A, 4)) == [BeginHandOff(A, (0,), 0)]


def test_a_prompt_that_never_fits_is_refused_with_what_to_change() -> None:
    [fail, released] = tell(make(blocks=2), arrive(A, 9))
    assert isinstance(fail, Fail)
    assert "kv-memory-mib" in fail.error.message
    assert released == Released(A)


def test_a_repeated_arrival_changes_nothing() -> None:
    scheduler = make()
    tell(scheduler, arrive(A))
    assert tell(scheduler, arrive(A)) == []
    assert scheduler.tickets() == [A]


def test_a_deadline_ends_a_waiting_leg_and_lets_the_next_in() -> None:
    scheduler = make(blocks=2)
    tell(scheduler, arrive(A, 4))
    tell(scheduler, arrive(B, 8, deadline=5.0))
    tell(scheduler, arrive(C, 4))
    assert scheduler.tick(4.9) == []
    [fail, *rest] = scheduler.tick(5.0)
    assert isinstance(fail, Fail)
    assert (fail.ticket, fail.error.code) == (B, "DEADLINE_EXCEEDED")
    assert rest == [Released(B), BeginHandOff(C, (1,), 0)]


def test_a_deadline_during_a_step_fails_now_and_releases_after_it() -> None:
    scheduler = make()
    tell(scheduler, arrive(A, 8, deadline=5.0))
    step(scheduler)
    [fail, cancel] = scheduler.tick(5.0)
    assert isinstance(fail, Fail)
    assert cancel == CancelHandOff(A, fail.error)
    assert scheduler.tick(6.0) == []
    assert tell(scheduler, HandOffEnded(A, fail.error)) == []
    assert tell(scheduler, StepDone({}, STEP_S)) == [Released(A)]


def test_a_cancelled_waiting_leg_goes_at_once() -> None:
    scheduler = make(blocks=1)
    for ticket in (A, B):
        tell(scheduler, arrive(ticket, 4))
    assert tell(scheduler, Cancel(B, GONE)) == [Released(B)]


def test_a_cancelled_leg_between_steps_waits_for_its_hand_off_only() -> None:
    scheduler = make()
    tell(scheduler, arrive(A, 8))
    compute(scheduler)
    assert tell(scheduler, Cancel(A, GONE)) == [CancelHandOff(A, GONE)]
    assert scheduler.next_step(0.0) == []
    assert tell(scheduler, HandOffEnded(A, GONE)) == [Released(A)]


@pytest.mark.parametrize("step_ends_first", [True, False])
def test_a_leg_cancelled_during_a_step_is_released_after_step_and_hand_off(
    step_ends_first: bool,
) -> None:
    scheduler = make()
    tell(scheduler, arrive(A, 4))
    step(scheduler)
    tell(scheduler, Cancel(A, GONE))
    ends: list[Event] = [StepDone({A: 50}, STEP_S), HandOffEnded(A, GONE)]
    first, second = ends if step_ends_first else reversed(ends)
    assert tell(scheduler, first) == []
    assert tell(scheduler, second) == [Released(A)]


def test_a_cancelled_hand_off_keeps_the_blocks_until_it_has_ended() -> None:
    scheduler = computed()
    assert tell(scheduler, Cancel(A, GONE)) == [CancelHandOff(A, GONE)]
    assert tell(scheduler, Cancel(A, GONE)) == []
    assert scheduler.tickets() == [A]
    assert tell(scheduler, HandOffEnded(A, None)) == [Released(A)]


def test_a_failed_hand_off_fails_the_leg() -> None:
    assert tell(computed(), HandOffEnded(A, LOST)) == [Fail(A, LOST), Released(A)]


def test_a_hand_off_that_fails_during_a_step_releases_after_it() -> None:
    scheduler = make()
    tell(scheduler, arrive(A, 8))
    step(scheduler)
    assert tell(scheduler, HandOffEnded(A, LOST)) == [Fail(A, LOST)]
    assert tell(scheduler, StepDone({}, STEP_S)) == [Released(A)]


def test_a_failed_step_fails_the_leg_and_cancels_its_hand_off() -> None:
    scheduler = make()
    tell(scheduler, arrive(A, 8))
    step(scheduler)
    assert tell(scheduler, StepFailed(BROKEN)) == [Fail(A, BROKEN), CancelHandOff(A, BROKEN)]
    assert tell(scheduler, HandOffEnded(A, BROKEN)) == [Released(A)]


def test_after_a_failed_step_each_leg_of_it_is_tried_alone() -> None:
    """So that what is wrong with one of them ends no other."""
    scheduler = make(blocks=8, step_tokens=16)
    for ticket in (A, B, C):
        tell(scheduler, arrive(ticket, 4))
    assert len(step(scheduler)) == 3
    assert tell(scheduler, StepFailed(BROKEN)) == []
    assert [chunk.ticket for chunk in step(scheduler)] == [A]
    assert tell(scheduler, StepDone({A: 50}, STEP_S)) == [Token(A, 50), EndHandOff(A, 50)]
    assert [chunk.ticket for chunk in step(scheduler)] == [B]
    assert tell(scheduler, StepFailed(BROKEN)) == [Fail(B, BROKEN), CancelHandOff(B, BROKEN)]
    assert compute(scheduler) == [Token(C, 50), EndHandOff(C, 50)]


def test_a_step_that_fails_after_the_deadline_is_not_a_second_failure() -> None:
    scheduler = make()
    tell(scheduler, arrive(A, 8, deadline=5.0))
    step(scheduler)
    scheduler.tick(5.0)
    assert tell(scheduler, StepFailed(BROKEN)) == []


def test_an_end_token_finishes_the_answer_here() -> None:
    scheduler = make()
    tell(scheduler, arrive(A, 4))
    [finish, cancel] = compute(scheduler, EOS)
    assert finish == Finish(A, FinishReason.STOP)
    assert isinstance(cancel, CancelHandOff)
    assert tell(scheduler, HandOffEnded(A, cancel.error)) == [Released(A)]


def test_an_end_token_that_is_ignored_is_a_token() -> None:
    scheduler = make()
    tell(scheduler, arrive(A, 4, ignore_eos=True))
    assert compute(scheduler, EOS) == [Token(A, EOS), EndHandOff(A, EOS)]


def test_an_answer_of_one_token_needs_no_decode_node() -> None:
    scheduler = make()
    tell(scheduler, arrive(A, 4, max_tokens=1))
    [token, finish, cancel] = compute(scheduler)
    assert (token, finish) == (Token(A, 50), Finish(A, FinishReason.LENGTH))
    assert isinstance(cancel, CancelHandOff)


@pytest.mark.parametrize(
    "late",
    [Cancel(A, GONE), HandOffEnded(A, LOST)],
    ids=lambda event: type(event).__name__,
)
def test_events_of_a_leg_that_is_gone_change_nothing(late: Event) -> None:
    scheduler = computed()
    tell(scheduler, HandOffEnded(A, None))
    assert tell(scheduler, late) == []
    scheduler.check_invariants()


TOTAL = 5


class Node(RuleBasedStateMachine):
    """Plays the shell: random events in any order that a shell can bring about.

    It keeps its own account of what uses which blocks, to hold the scheduler's actions against.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.scheduler = PrefillScheduler(self.pool, BLOCK, Limits(CHUNK, 2, 4.0), (EOS,))
        self.now = 0.0
        self.attempt = 0
        self.alive: set[Ticket] = set()
        self.ever: list[Ticket] = []
        self.stepping: list[Chunk] = []
        self.computed: dict[Ticket, int] = {}
        self.prompts: dict[Ticket, tuple[int, ...]] = {}
        # What was computed into each block's slots: the tokens up to and with it.
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.handing_off: dict[Ticket, tuple[int, ...]] = {}
        self.cancelled_hand_offs: set[Ticket] = set()
        self.last_words: Counter[Ticket] = Counter()
        self.tokens: Counter[Ticket] = Counter()

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            ticket = action.ticket
            assert ticket in self.alive, f"{action} comes after Released"
            match action:
                case BeginHandOff(_, blocks, cached_tokens):
                    assert ticket not in self.handing_off, "one hand-off for each leg"
                    assert cached_tokens < len(self.prompts[ticket]), "the last is computed"
                    own = blocks[cached_tokens // BLOCK :]
                    in_use = {b for held in self.handing_off.values() for b in held}
                    assert in_use.isdisjoint(own), "blocks of a hand-off are not written (P7)"
                    self.handing_off[ticket] = blocks
                    self.computed[ticket] = cached_tokens
                    self.check_kv(ticket)
                case CancelHandOff():
                    assert ticket in self.handing_off
                    assert ticket not in self.cancelled_hand_offs, "cancelled once"
                    self.cancelled_hand_offs.add(ticket)
                case EndHandOff():
                    assert ticket in self.handing_off
                    assert self.tokens[ticket] == 1
                case Token():
                    self.tokens[ticket] += 1
                    assert self.tokens[ticket] == 1
                case Fail() | Finish():
                    self.last_words[ticket] += 1
                    assert self.last_words[ticket] == 1, "a leg ends once (P1)"
                case Released():
                    assert ticket not in self.handing_off, "a link still reads these blocks (P7)"
                    assert ticket not in {chunk.ticket for chunk in self.stepping}, "a step runs"
                    self.alive.remove(ticket)

    def handle(self, event: Event) -> None:
        self.perform(self.scheduler.handle(event, self.now))

    def check_kv(self, ticket: Ticket) -> None:
        """What the leg believes to be computed is its own tokens' KV."""
        for place in range(self.computed[ticket]):
            slot = (self.handing_off[ticket][place // BLOCK], place % BLOCK)
            assert self.memory.get(slot) == self.prompts[ticket][: place + 1], "a wrong hit"

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3),
        repeats=st.integers(1, BLOCK * 2),
        max_tokens=st.integers(1, 3),
        ignore_eos=st.booleans(),
        due=st.integers(1, 9),
        patience=st.integers(1, 6),
    )
    def arrives(
        self,
        tokens: list[int],
        repeats: int,
        max_tokens: int,
        ignore_eos: bool,
        due: int,
        patience: int,
    ) -> None:
        self.attempt += 1
        ticket = Ticket("request", self.attempt, 1, 2)
        self.alive.add(ticket)
        self.ever.append(ticket)
        stop = StopParams(max_tokens, ignore_eos)
        self.prompts[ticket] = tuple(tokens * repeats)  # of few kinds: prefixes meet often
        prompt = self.prompts[ticket]
        self.handle(Arrive(ticket, prompt, stop, self.now + due, self.now + patience))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def arrives_again(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.alive, key=str)))
        before = self.scheduler.tickets()
        self.handle(Arrive(ticket, (1, 2, 3), StopParams(5), self.now, self.now + 9))
        assert self.scheduler.tickets() == before

    @precondition(lambda self: not self.stepping)
    @rule()
    def step_begins(self) -> None:
        self.stepping = self.scheduler.next_step(self.now)
        assert bool(self.stepping) == (self.scheduler.count(LegState.COMPUTING) > 0)
        assert sum(chunk.stop - chunk.start for chunk in self.stepping) <= CHUNK
        for chunk in self.stepping:
            assert chunk.block_table == self.pool.owned(chunk.ticket)
            assert chunk.start == self.computed[chunk.ticket], "no gap and no repeat"

    @precondition(lambda self: self.stepping)
    @rule(token_id=st.sampled_from([EOS, 50, 51]), fails=st.booleans())
    def step_ends(self, token_id: int, fails: bool) -> None:
        chunks, self.stepping = self.stepping, []
        for chunk in chunks:
            for place in range(chunk.start, chunk.stop):
                block = chunk.block_table[place // BLOCK]
                readers = [t for t, held in self.handing_off.items() if block in held]
                assert set(readers) <= {chunk.ticket}, "nobody writes where another reads"
                kv = self.prompts[chunk.ticket][: place + 1]
                self.memory[block, place % BLOCK] = kv
        if fails and token_id == 51:
            self.handle(StepFailed(BROKEN))
        else:
            for chunk in chunks:
                self.computed[chunk.ticket] = chunk.stop
            self.handle(done(chunks, token_id))

    @precondition(lambda self: self.handing_off)
    @rule(data=st.data())
    def hand_off_ends(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.handing_off, key=str)))
        del self.handing_off[ticket]
        may_commit = self.tokens[ticket] == 1
        committed = may_commit and data.draw(st.booleans())
        self.handle(HandOffEnded(ticket, None if committed else LOST))

    @precondition(lambda self: self.ever)
    @rule(data=st.data())
    def router_cancels(self, data: st.DataObject) -> None:
        """Any leg, be it gone or not."""
        self.handle(Cancel(data.draw(st.sampled_from(self.ever)), GONE))

    @rule(seconds=st.integers(0, 3))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        self.perform(self.scheduler.tick(self.now))

    @invariant()
    def nothing_is_released_while_used(self) -> None:
        self.scheduler.check_invariants()
        assert set(self.scheduler.tickets()) == self.alive, "a leg that goes says Released"
        assert self.scheduler.count(LegState.WAITING) <= 2, "the queue has a limit (P8)"
        for ticket, blocks in self.handing_off.items():
            assert self.pool.owned(ticket) == blocks
            self.check_kv(ticket)
        for chunk in self.stepping:
            assert self.pool.owned(chunk.ticket) == chunk.block_table

    def teardown(self) -> None:
        """Cancel everything and let everything end: nothing is left over (P5)."""
        while self.alive:  # a release may let a waiting leg in
            for ticket in sorted(self.alive, key=str):
                self.handle(Cancel(ticket, GONE))
            if self.stepping:
                chunks, self.stepping = self.stepping, []
                self.handle(done(chunks))
            for ticket in list(self.handing_off):
                del self.handing_off[ticket]
                self.handle(HandOffEnded(ticket, GONE))
            self.nothing_is_released_while_used()
        assert self.pool.leased == 0


TestNode = Node.TestCase
TestNode.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
