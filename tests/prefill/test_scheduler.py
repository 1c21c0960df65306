"""What a prefill node decides: every leg ends once, and its blocks outlive whatever uses them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.errors import Cancelled, EngineFailed, LinkLost
from baton.ids import Ticket
from baton.sampling import FinishReason, StopParams
from engine.block_pool import BlockPool
from prefill.scheduler import (
    Action,
    Arrive,
    BeginHandOff,
    Cancel,
    CancelHandOff,
    ChunkDone,
    ChunkPlan,
    EndHandOff,
    Event,
    Fail,
    Finish,
    HandOffEnded,
    LegState,
    PrefillScheduler,
    Released,
    StepFailed,
    Token,
)

BLOCK, CHUNK, EOS = 4, 6, 2
A, B, C = (Ticket(name, 0, 1, 2) for name in "abc")
GONE = Cancelled("the client left")
BROKEN = EngineFailed("the step raised")
LOST = LinkLost("the peer went away")


def make(blocks: int = 4, max_waiting: int = 2) -> PrefillScheduler:
    return PrefillScheduler(BlockPool(blocks), BLOCK, CHUNK, max_waiting, (EOS,))


def arrive(ticket: Ticket, tokens: int = 8, deadline: float = 100.0, **stop: int) -> Arrive:
    return Arrive(ticket, tokens, StopParams(**{"max_tokens": 10, **stop}), deadline)


def step(scheduler: PrefillScheduler) -> ChunkPlan:
    plan = scheduler.next_step()
    assert plan is not None, "there is something to compute"
    return plan


def compute(scheduler: PrefillScheduler, token_id: int = 50) -> list[Action]:
    """Run one chunk; the actions it leads to."""
    plan = step(scheduler)
    return scheduler.handle(ChunkDone(plan.ticket, token_id if plan.last else None))


def computed(**stop: int) -> PrefillScheduler:
    """A scheduler whose one leg, A, has computed its prompt and is handing off."""
    scheduler = make()
    scheduler.handle(arrive(A, 4, **stop))
    compute(scheduler)
    return scheduler


def test_a_leg_computes_hands_off_and_is_released() -> None:
    scheduler = make()
    assert scheduler.handle(arrive(A, 8)) == [BeginHandOff(A, (0, 1))]
    assert step(scheduler) == ChunkPlan(A, 0, 6, (0, 1), last=False)
    assert scheduler.handle(ChunkDone(A, None)) == []
    assert step(scheduler) == ChunkPlan(A, 6, 8, (0, 1), last=True)
    assert scheduler.handle(ChunkDone(A, 50)) == [Token(A, 50), EndHandOff(A, 50)]
    assert scheduler.next_step() is None
    assert scheduler.handle(HandOffEnded(A, None)) == [Released(A)]
    assert scheduler.tickets() == []


def test_legs_are_computed_in_the_order_they_came() -> None:
    scheduler = make()
    for ticket in (A, B):
        scheduler.handle(arrive(ticket, 8))
    served = []
    while (plan := scheduler.next_step()) is not None:
        served.append(plan.ticket)
        scheduler.handle(ChunkDone(plan.ticket, 50 if plan.last else None))
    assert served == [A, A, B, B]


def test_a_leg_waits_until_blocks_are_free() -> None:
    scheduler = make(blocks=2)
    scheduler.handle(arrive(A, 8))
    assert scheduler.handle(arrive(B, 4)) == []
    assert scheduler.count(LegState.WAITING) == 1
    assert scheduler.handle(Cancel(A, GONE)) == [CancelHandOff(A, GONE)]
    assert scheduler.handle(HandOffEnded(A, GONE)) == [Released(A), BeginHandOff(B, (0,))]


def test_a_small_leg_does_not_overtake_a_big_one() -> None:
    """Else a stream of small prompts would starve a big one for ever (P1)."""
    scheduler = make(blocks=3)
    scheduler.handle(arrive(A, 8))
    scheduler.handle(arrive(B, 12))
    assert scheduler.handle(arrive(C, 4)) == []


def test_a_full_queue_refuses_at_once() -> None:
    scheduler = make(blocks=1, max_waiting=1)
    for ticket in (A, B):
        scheduler.handle(arrive(ticket, 4))
    [fail, released] = scheduler.handle(arrive(C, 4))
    assert isinstance(fail, Fail)
    assert fail.error.code == "RESOURCE_EXHAUSTED"
    assert released == Released(C)
    assert scheduler.tickets() == [A, B]


def test_no_queue_at_all_still_admits_what_fits() -> None:
    scheduler = make(blocks=1, max_waiting=0)
    assert scheduler.handle(arrive(A, 4)) == [BeginHandOff(A, (0,))]


def test_a_prompt_that_never_fits_is_refused_with_what_to_change() -> None:
    [fail, released] = make(blocks=2).handle(arrive(A, 9))
    assert isinstance(fail, Fail)
    assert "kv-memory-mib" in fail.error.message
    assert released == Released(A)


def test_a_repeated_arrival_changes_nothing() -> None:
    scheduler = make()
    scheduler.handle(arrive(A))
    assert scheduler.handle(arrive(A)) == []
    assert scheduler.tickets() == [A]


def test_a_deadline_ends_a_waiting_leg_and_lets_the_next_in() -> None:
    scheduler = make(blocks=2)
    scheduler.handle(arrive(A, 4))
    scheduler.handle(arrive(B, 8, deadline=5.0))
    scheduler.handle(arrive(C, 4))
    assert scheduler.tick(4.9) == []
    [fail, *rest] = scheduler.tick(5.0)
    assert isinstance(fail, Fail)
    assert (fail.ticket, fail.error.code) == (B, "DEADLINE_EXCEEDED")
    assert rest == [Released(B), BeginHandOff(C, (1,))]


def test_a_deadline_during_a_step_fails_now_and_releases_after_it() -> None:
    scheduler = make()
    scheduler.handle(arrive(A, 8, deadline=5.0))
    step(scheduler)
    [fail, cancel] = scheduler.tick(5.0)
    assert isinstance(fail, Fail)
    assert cancel == CancelHandOff(A, fail.error)
    assert scheduler.tick(6.0) == []
    assert scheduler.handle(HandOffEnded(A, fail.error)) == []
    assert scheduler.handle(ChunkDone(A, None)) == [Released(A)]


def test_a_cancelled_waiting_leg_goes_at_once() -> None:
    scheduler = make(blocks=1)
    for ticket in (A, B):
        scheduler.handle(arrive(ticket, 4))
    assert scheduler.handle(Cancel(B, GONE)) == [Released(B)]


def test_a_cancelled_leg_between_steps_waits_for_its_hand_off_only() -> None:
    scheduler = make()
    scheduler.handle(arrive(A, 8))
    compute(scheduler)
    assert scheduler.handle(Cancel(A, GONE)) == [CancelHandOff(A, GONE)]
    assert scheduler.next_step() is None
    assert scheduler.handle(HandOffEnded(A, GONE)) == [Released(A)]


@pytest.mark.parametrize("step_ends_first", [True, False])
def test_a_leg_cancelled_during_a_step_is_released_after_step_and_hand_off(
    step_ends_first: bool,
) -> None:
    scheduler = make()
    scheduler.handle(arrive(A, 4))
    step(scheduler)
    scheduler.handle(Cancel(A, GONE))
    ends: list[Event] = [ChunkDone(A, 50), HandOffEnded(A, GONE)]
    first, second = ends if step_ends_first else reversed(ends)
    assert scheduler.handle(first) == []
    assert scheduler.handle(second) == [Released(A)]


def test_a_cancelled_hand_off_keeps_the_blocks_until_it_has_ended() -> None:
    scheduler = computed()
    assert scheduler.handle(Cancel(A, GONE)) == [CancelHandOff(A, GONE)]
    assert scheduler.handle(Cancel(A, GONE)) == []
    assert scheduler.tickets() == [A]
    assert scheduler.handle(HandOffEnded(A, None)) == [Released(A)]


def test_a_failed_hand_off_fails_the_leg() -> None:
    assert computed().handle(HandOffEnded(A, LOST)) == [Fail(A, LOST), Released(A)]


def test_a_hand_off_that_fails_during_a_step_releases_after_it() -> None:
    scheduler = make()
    scheduler.handle(arrive(A, 8))
    step(scheduler)
    assert scheduler.handle(HandOffEnded(A, LOST)) == [Fail(A, LOST)]
    assert scheduler.handle(ChunkDone(A, None)) == [Released(A)]


def test_a_failed_step_fails_the_leg_and_cancels_its_hand_off() -> None:
    scheduler = make()
    scheduler.handle(arrive(A, 8))
    step(scheduler)
    assert scheduler.handle(StepFailed(A, BROKEN)) == [Fail(A, BROKEN), CancelHandOff(A, BROKEN)]
    assert scheduler.handle(HandOffEnded(A, BROKEN)) == [Released(A)]


def test_a_step_that_fails_after_the_deadline_is_not_a_second_failure() -> None:
    scheduler = make()
    scheduler.handle(arrive(A, 8, deadline=5.0))
    step(scheduler)
    scheduler.tick(5.0)
    assert scheduler.handle(StepFailed(A, BROKEN)) == []


def test_an_end_token_finishes_the_answer_here() -> None:
    scheduler = make()
    scheduler.handle(arrive(A, 4))
    [finish, cancel] = compute(scheduler, EOS)
    assert finish == Finish(A, FinishReason.STOP)
    assert isinstance(cancel, CancelHandOff)
    assert scheduler.handle(HandOffEnded(A, cancel.error)) == [Released(A)]


def test_an_end_token_that_is_ignored_is_a_token() -> None:
    scheduler = make()
    scheduler.handle(arrive(A, 4, ignore_eos=True))
    assert compute(scheduler, EOS) == [Token(A, EOS), EndHandOff(A, EOS)]


def test_an_answer_of_one_token_needs_no_decode_node() -> None:
    scheduler = make()
    scheduler.handle(arrive(A, 4, max_tokens=1))
    [token, finish, cancel] = compute(scheduler)
    assert (token, finish) == (Token(A, 50), Finish(A, FinishReason.LENGTH))
    assert isinstance(cancel, CancelHandOff)


@pytest.mark.parametrize(
    "late",
    [Cancel(A, GONE), ChunkDone(A, 50), StepFailed(A, BROKEN), HandOffEnded(A, LOST)],
    ids=lambda event: type(event).__name__,
)
def test_events_of_a_leg_that_is_gone_change_nothing(late: Event) -> None:
    scheduler = computed()
    scheduler.handle(HandOffEnded(A, None))
    assert scheduler.handle(late) == []
    scheduler.check_invariants()


TOTAL = 5


class Node(RuleBasedStateMachine):
    """Plays the shell: random events in any order that a shell can bring about.

    It keeps its own account of what uses which blocks, to hold the scheduler's actions against.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.scheduler = PrefillScheduler(self.pool, BLOCK, CHUNK, 2, (EOS,))
        self.now = 0.0
        self.attempt = 0
        self.alive: set[Ticket] = set()
        self.ever: list[Ticket] = []
        self.stepping: ChunkPlan | None = None
        self.handing_off: dict[Ticket, tuple[int, ...]] = {}
        self.cancelled_hand_offs: set[Ticket] = set()
        self.last_words: Counter[Ticket] = Counter()
        self.tokens: Counter[Ticket] = Counter()

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            ticket = action.ticket
            assert ticket in self.alive, f"{action} comes after Released"
            match action:
                case BeginHandOff(_, blocks):
                    assert ticket not in self.handing_off, "one hand-off for each leg"
                    in_use = {b for held in self.handing_off.values() for b in held}
                    assert in_use.isdisjoint(blocks), "blocks of a hand-off are not given away"
                    self.handing_off[ticket] = blocks
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
                    assert self.stepping is None or self.stepping.ticket != ticket, "a step runs"
                    self.alive.remove(ticket)

    def handle(self, event: Event) -> None:
        self.perform(self.scheduler.handle(event))

    @rule(
        tokens=st.integers(1, BLOCK * (TOTAL + 1)),
        max_tokens=st.integers(1, 3),
        ignore_eos=st.booleans(),
        patience=st.integers(1, 6),
    )
    def arrives(self, tokens: int, max_tokens: int, ignore_eos: bool, patience: int) -> None:
        self.attempt += 1
        ticket = Ticket("request", self.attempt, 1, 2)
        self.alive.add(ticket)
        self.ever.append(ticket)
        stop = StopParams(max_tokens, ignore_eos)
        self.handle(Arrive(ticket, tokens, stop, self.now + patience))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def arrives_again(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.alive, key=str)))
        before = self.scheduler.tickets()
        self.handle(Arrive(ticket, 4, StopParams(5), self.now + 9))
        assert self.scheduler.tickets() == before

    @precondition(lambda self: self.stepping is None)
    @rule()
    def step_begins(self) -> None:
        self.stepping = self.scheduler.next_step()
        if self.stepping is not None:
            assert self.stepping.block_table == self.pool.owned(self.stepping.ticket)

    @precondition(lambda self: self.stepping)
    @rule(token_id=st.sampled_from([EOS, 50, 51]), fails=st.booleans())
    def step_ends(self, token_id: int, fails: bool) -> None:
        plan, self.stepping = self.stepping, None
        assert plan is not None
        if fails and token_id == 51:
            self.handle(StepFailed(plan.ticket, BROKEN))
        else:
            self.handle(ChunkDone(plan.ticket, token_id if plan.last else None))

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
        if self.stepping is not None:
            assert self.pool.owned(self.stepping.ticket) == self.stepping.block_table

    def teardown(self) -> None:
        """Cancel everything and let everything end: nothing is left over (P5)."""
        while self.alive:  # a release may let a waiting leg in
            for ticket in sorted(self.alive, key=str):
                self.handle(Cancel(ticket, GONE))
            if self.stepping is not None:
                plan, self.stepping = self.stepping, None
                self.handle(ChunkDone(plan.ticket, None))
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
