"""What a decode node decides: tokens in order, one end a leg, blocks that outlive their use."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.errors import Cancelled, EngineFailed, LinkLost
from baton.ids import Ticket
from baton.leg_events import Cancel, CancelHandOff, Fail, Finish, Released, StepFailed
from baton.sampling import FinishReason, SamplingParams, StopParams
from decode.events import (
    Action,
    Arrive,
    Committed,
    Event,
    HandOffEnded,
    Reserve,
    Row,
    Step,
    StepDone,
    Token,
    Transferred,
)
from decode.scheduler import DecodeScheduler, LegState, Limits
from engine.block_pool import BlockPool

BLOCK, EOS = 4, 2
A, B, C, D = (Ticket(name, 0, 1, 2) for name in "abcd")
GREEDY = SamplingParams()
GONE = Cancelled("the client left")
BROKEN = EngineFailed("the step raised")
LOST = LinkLost("the peer went away")


def make(
    blocks: int = 8,
    max_running: int = 4,
    max_waiting: int = 2,
    step_tokens: int = 16,
    watermark: int = 0,
    guesses: int = 0,
) -> DecodeScheduler:
    limits = Limits(max_running, step_tokens, max_waiting, watermark)
    return DecodeScheduler(BlockPool(blocks), BLOCK, limits, (EOS,), guesses)


def prompt_of(ticket: Ticket, tokens: int) -> tuple[int, ...]:
    """A prompt that shares no block with another's."""
    return tuple(1000 * ord(ticket.request_id[-1]) + place for place in range(tokens))


def arrive(
    ticket: Ticket,
    tokens: int = 4,
    max_tokens: int = 5,
    ignore_eos: bool = False,
    deadline: float = 100.0,
) -> Arrive:
    stop = StopParams(max_tokens, ignore_eos)
    return Arrive(ticket, prompt_of(ticket, tokens), GREEDY, stop, deadline)


def running(*tickets: Ticket, max_tokens: int = 5, **options: int) -> DecodeScheduler:
    """A scheduler with legs whose prompts have been committed."""
    scheduler = make(**options)
    for ticket in tickets:
        scheduler.handle(arrive(ticket, max_tokens=max_tokens))
        scheduler.handle(Committed(ticket, 40))
    return scheduler


def done(step: Step, token_id: int = 50) -> StepDone:
    return StepDone({row.ticket: (token_id,) if row.last else () for row in step.rows})


def step(scheduler: DecodeScheduler, token_id: int = 50) -> list[Action]:
    """Run one step that gives every row the same token; the actions it leads to."""
    planned = scheduler.next_step()
    assert planned.rows, "there is something to compute"
    return scheduler.handle(done(planned, token_id))


def test_a_leg_receives_runs_and_is_released() -> None:
    scheduler = make()
    assert scheduler.handle(arrive(A, 6, max_tokens=4)) == [Reserve(A, 6, (0, 1), 100.0)]
    assert scheduler.handle(Committed(A, 40)) == [Transferred(A, 6)]
    assert scheduler.next_step() == Step((Row(A, (40,), 6, (0, 1), GREEDY),))
    assert scheduler.handle(StepDone({A: (41,)})) == [Token(A, 1, 41)]
    assert scheduler.next_step() == Step((Row(A, (41,), 7, (0, 1), GREEDY),))
    assert scheduler.handle(StepDone({A: (42,)})) == [Token(A, 2, 42)]
    assert scheduler.next_step() == Step((Row(A, (42,), 8, (0, 1, 2), GREEDY),))
    assert scheduler.handle(StepDone({A: (43,)})) == [
        Token(A, 3, 43),
        Finish(A, FinishReason.LENGTH),
        Released(A),
    ]
    assert scheduler.tickets() == []


@pytest.mark.parametrize(("tokens", "max_tokens", "blocks"), [(4, 1, 1), (4, 2, 2), (3, 9, 1)])
def test_a_leg_is_taken_in_with_room_for_the_first_token_it_feeds(
    tokens: int, max_tokens: int, blocks: int
) -> None:
    """And for none where the answer has no other than prefill's."""
    [reserve] = make().handle(arrive(A, tokens, max_tokens=max_tokens))
    assert isinstance(reserve, Reserve)
    assert len(reserve.block_table) == blocks


def test_the_youngest_gives_its_blocks_up_when_none_is_left() -> None:
    """B's last block goes to A; B waits, then computes again what is no longer in the cache."""
    scheduler = running(A, B, blocks=4, max_tokens=9)
    for _ in range(4):
        step(scheduler)  # four more tokens each: their second blocks are full
    planned = scheduler.next_step()
    assert ([row.ticket for row in planned.rows], planned.preempted) == ([A], (B,))
    assert scheduler.count(LegState.PREEMPTED) == 1
    scheduler.handle(done(planned))
    assert scheduler.next_step().rows[0].ticket == A
    scheduler.handle(Cancel(A, GONE))
    scheduler.handle(StepDone({A: (50,)}))
    [row] = scheduler.next_step().rows
    assert (row.ticket, row.start, row.last) == (B, 4, True)
    assert row.token_ids == (40, 50, 50, 50, 50), "its first block was still there"
    assert scheduler.handle(StepDone({B: (51,)})) == [Token(B, 5, 51)]
    assert (scheduler.preemptions, scheduler.recomputed_tokens) == (1, 4)


def test_what_is_computed_again_stays_within_the_budget() -> None:
    scheduler = running(A, B, blocks=4, max_tokens=9, step_tokens=3)
    for _ in range(4):
        step(scheduler)
    scheduler.handle(done(scheduler.next_step()))
    scheduler.handle(Cancel(A, GONE))
    spans = []
    while not (planned := scheduler.next_step()).rows[0].last:
        [row] = planned.rows
        spans.append((row.start, len(row.token_ids)))
        assert scheduler.handle(done(planned)) == []
    assert spans == [(4, 3)]
    assert planned.rows[0].token_ids == (50, 50)


def test_a_leg_that_runs_is_never_held_up_by_younger_ones() -> None:
    """C came while nothing was left for it; it waits behind B, which was preempted."""
    scheduler = running(A, B, blocks=4, max_tokens=9)
    scheduler.handle(arrive(C, 1))
    for _ in range(4):
        step(scheduler)
    scheduler.handle(done(scheduler.next_step()))
    assert scheduler.count(LegState.WAITING, LegState.PREEMPTED) == 2
    scheduler.handle(Cancel(A, GONE))
    assert [row.ticket for row in scheduler.next_step().rows] == [B]


def test_a_hand_off_is_not_preempted_and_who_needs_its_blocks_waits_for_it() -> None:
    scheduler = running(A, blocks=3, max_tokens=6)
    scheduler.handle(arrive(B, 4, max_tokens=1))
    for _ in range(4):
        step(scheduler)
    assert scheduler.next_step() == Step(())
    scheduler.handle(Committed(B, 40))
    assert [row.ticket for row in scheduler.next_step().rows] == [A]


def test_a_watermark_leaves_running_legs_room_to_grow() -> None:
    scheduler = running(A, blocks=5, watermark=2)
    assert scheduler.handle(arrive(B)) == [], "two blocks would be left of three, then one"
    assert scheduler.handle(Cancel(A, GONE))[-1] == Reserve(B, 4, (2, 3), 100.0)


def test_a_watermark_keeps_nobody_out_of_an_empty_node() -> None:
    assert len(make(blocks=3, watermark=2).handle(arrive(A, 8))) == 1


def test_guesses_are_tried_where_there_is_room_and_taken_as_far_as_they_are_right() -> None:
    scheduler = running(A, max_tokens=9, guesses=3)
    [row] = scheduler.next_step().rows
    assert (row.token_ids, row.start, row.guesses) == ((40,), 4, 3)
    assert scheduler.handle(StepDone({A: (41, 42, 43)})) == [
        Token(A, 1, 41),
        Token(A, 2, 42),
        Token(A, 3, 43),
    ]
    [row] = scheduler.next_step().rows
    assert (row.token_ids, row.start, row.guesses) == ((43,), 7, 3)


def test_no_more_is_guessed_than_the_answer_may_have() -> None:
    scheduler = running(A, max_tokens=3, guesses=3)
    [row] = scheduler.next_step().rows
    assert row.guesses == 1, "of three tokens one is there and one is chosen anyway"


def test_an_end_among_guesses_ends_the_answer_there() -> None:
    scheduler = running(A, max_tokens=9, guesses=3)
    scheduler.next_step()
    assert scheduler.handle(StepDone({A: (41, EOS, 43)})) == [
        Token(A, 1, 41),
        Finish(A, FinishReason.STOP),
        Released(A),
    ]


def test_guesses_cost_nobody_a_block() -> None:
    """Two blocks are all there is: A guesses within its own, and B is not preempted for it."""
    scheduler = running(A, B, blocks=4, max_tokens=9, guesses=4)
    planned = scheduler.next_step()
    assert ([row.guesses for row in planned.rows], planned.preempted) == ([3, 3], ())


def test_nothing_runs_before_its_prompt_is_here() -> None:
    scheduler = make()
    scheduler.handle(arrive(A))
    assert scheduler.next_step() == Step(())


def test_an_end_token_ends_the_answer_and_is_no_part_of_it() -> None:
    assert step(running(A), EOS) == [Finish(A, FinishReason.STOP), Released(A)]


def test_an_end_token_that_is_ignored_is_a_token() -> None:
    scheduler = make()
    scheduler.handle(arrive(A, ignore_eos=True))
    scheduler.handle(Committed(A, 40))
    assert step(scheduler, EOS) == [Token(A, 1, EOS)]


def test_an_answer_of_one_token_is_whole_when_it_is_committed() -> None:
    scheduler = make()
    scheduler.handle(arrive(A, max_tokens=1))
    assert scheduler.handle(Committed(A, 40)) == [
        Transferred(A, 4),
        Finish(A, FinishReason.LENGTH),
        Released(A),
    ]


def test_legs_wait_for_blocks_in_the_order_they_came() -> None:
    scheduler = make(blocks=3)
    scheduler.handle(arrive(A))
    assert scheduler.handle(arrive(B)) == []
    assert scheduler.handle(arrive(C, 1, max_tokens=1)) == [], "C would fit, but B is first"
    scheduler.handle(Cancel(A, GONE))
    [released, first, second] = scheduler.handle(HandOffEnded(A, GONE))
    assert released == Released(A)
    assert [first.ticket, second.ticket] == [B, C]


def test_a_full_queue_refuses_at_once() -> None:
    scheduler = make(blocks=2, max_waiting=1)
    for ticket in (A, B):
        scheduler.handle(arrive(ticket))
    [fail, released] = scheduler.handle(arrive(C))
    assert isinstance(fail, Fail)
    assert fail.error.code == "RESOURCE_EXHAUSTED"
    assert released == Released(C)
    assert scheduler.tickets() == [A, B]


def test_an_answer_that_never_fits_is_refused_with_what_to_change() -> None:
    [fail, released] = make(blocks=2).handle(arrive(A, 4, max_tokens=6))
    assert isinstance(fail, Fail)
    assert "kv-memory-mib" in fail.error.message
    assert released == Released(A)


def test_a_repeated_arrival_changes_nothing() -> None:
    scheduler = running(A)
    assert scheduler.handle(arrive(A)) == []
    assert scheduler.tickets() == [A]


def test_legs_beyond_a_step_take_turns() -> None:
    scheduler = running(A, B, C, max_running=2)
    served: Counter[Ticket] = Counter()
    for _ in range(3):
        planned = scheduler.next_step()
        assert len(planned.rows) == 2
        served.update(row.ticket for row in planned.rows)
        scheduler.handle(done(planned))
    assert served == {A: 2, B: 2, C: 2}


def test_a_leg_may_join_while_a_step_runs() -> None:
    scheduler = running(A)
    scheduler.handle(arrive(B))
    scheduler.next_step()
    scheduler.handle(Committed(B, 40))
    scheduler.handle(StepDone({A: (50,)}))
    assert [row.ticket for row in scheduler.next_step().rows] == [A, B]


def test_a_cancelled_leg_gives_no_more_tokens_and_goes_after_its_step() -> None:
    scheduler = running(A, B)
    scheduler.next_step()
    assert scheduler.handle(Cancel(A, GONE)) == []
    assert scheduler.handle(Cancel(A, GONE)) == []
    assert scheduler.handle(StepDone({A: (50,), B: (51,)})) == [Released(A), Token(B, 1, 51)]


def test_a_cancelled_leg_between_steps_goes_at_once() -> None:
    assert running(A).handle(Cancel(A, GONE)) == [Released(A)]


def test_a_cancelled_waiting_leg_goes_at_once() -> None:
    scheduler = make(blocks=2)
    for ticket in (A, B):
        scheduler.handle(arrive(ticket))
    assert scheduler.handle(Cancel(B, GONE)) == [Released(B)]


@pytest.mark.parametrize(
    "end", [HandOffEnded(A, GONE), Committed(A, 40)], ids=["ended", "committed"]
)
def test_a_cancelled_hand_off_keeps_the_blocks_until_it_has_ended(end: Event) -> None:
    """Also where it was committed before the cancellation reached it."""
    scheduler = make()
    scheduler.handle(arrive(A))
    assert scheduler.handle(Cancel(A, GONE)) == [CancelHandOff(A, GONE)]
    assert scheduler.tickets() == [A]
    assert scheduler.handle(end) == [Released(A)]


def test_a_failed_hand_off_fails_the_leg() -> None:
    scheduler = make()
    scheduler.handle(arrive(A))
    assert scheduler.handle(HandOffEnded(A, LOST)) == [Fail(A, LOST), Released(A)]


def test_after_a_failed_step_each_leg_of_it_is_tried_alone() -> None:
    """So that what is wrong with one of them ends no other."""
    scheduler = running(A, B, C)
    scheduler.next_step()
    assert scheduler.handle(StepFailed(BROKEN)) == []
    assert step(scheduler) == [Token(A, 1, 50)]
    assert [row.ticket for row in scheduler.next_step().rows] == [B]
    assert scheduler.handle(StepFailed(BROKEN)) == [Fail(B, BROKEN), Released(B)]
    assert step(scheduler) == [Token(C, 1, 50)]
    assert [row.ticket for row in scheduler.next_step().rows] == [A, C]


def test_a_step_that_fails_after_a_cancellation_is_no_failure_of_the_leg() -> None:
    scheduler = running(A)
    scheduler.next_step()
    scheduler.handle(Cancel(A, GONE))
    assert scheduler.handle(StepFailed(BROKEN)) == [Released(A)]


@pytest.mark.parametrize("state", [LegState.WAITING, LegState.RECEIVING, LegState.RUNNING])
def test_a_deadline_fails_a_leg_in_every_state(state: LegState) -> None:
    scheduler = make(blocks=2)
    if state is LegState.WAITING:
        scheduler.handle(arrive(B))
    scheduler.handle(arrive(A, deadline=5.0))
    if state is LegState.RUNNING:
        scheduler.handle(Committed(A, 40))
    assert scheduler.count(state) == 1
    assert scheduler.tick(4.9) == []
    [fail, last] = scheduler.tick(5.0)
    assert isinstance(fail, Fail)
    assert (fail.ticket, fail.error.code) == (A, "DEADLINE_EXCEEDED")
    wanted = CancelHandOff(A, fail.error) if state is LegState.RECEIVING else Released(A)
    assert last == wanted


def test_a_deadline_during_a_step_fails_now_and_releases_after_it() -> None:
    scheduler = make()
    scheduler.handle(arrive(A, deadline=5.0))
    scheduler.handle(Committed(A, 40))
    scheduler.next_step()
    [fail] = scheduler.tick(5.0)
    assert isinstance(fail, Fail)
    assert scheduler.handle(StepDone({A: (50,)})) == [Released(A)]


@pytest.mark.parametrize(
    "late",
    [Cancel(A, GONE), Committed(A, 40), HandOffEnded(A, LOST)],
    ids=lambda event: type(event).__name__,
)
def test_events_of_a_leg_that_is_gone_change_nothing(late: Event) -> None:
    scheduler = running(A)
    scheduler.handle(Cancel(A, GONE))
    assert scheduler.handle(late) == []
    scheduler.check_invariants()


TOTAL, MOST, BUDGET = 6, 2, 5


class Node(RuleBasedStateMachine):
    """Plays the shell: random events in any order that a shell can bring about.

    It keeps its own account of what uses which blocks, to hold the scheduler's actions against.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.scheduler = DecodeScheduler(self.pool, BLOCK, Limits(MOST, BUDGET, 2, 1), (EOS,), 2)
        self.now = 0.0
        self.attempt = 0
        self.alive: set[Ticket] = set()
        self.ever: list[Ticket] = []
        self.limit: dict[Ticket, int] = {}
        self.stepping: tuple[Row, ...] = ()
        self.known: dict[Ticket, list[int]] = {}  # prompt and answer
        # What was computed into each block's slots: the tokens up to and with it.
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.receiving: dict[Ticket, tuple[int, ...]] = {}
        self.cancelled_hand_offs: set[Ticket] = set()
        self.last_words: Counter[Ticket] = Counter()
        self.answered: dict[Ticket, int] = {}

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            ticket = action.ticket
            assert ticket in self.alive, f"{action} comes after Released"
            match action:
                case Reserve(_, _, blocks):
                    assert ticket not in self.receiving, "one hand-off for each leg"
                    in_use = {b for held in self.receiving.values() for b in held}
                    in_use.update(b for row in self.stepping for b in row.block_table)
                    assert in_use.isdisjoint(blocks), "blocks in use are not given away (P7)"
                    self.receiving[ticket] = blocks
                case CancelHandOff():
                    assert ticket in self.receiving
                    assert ticket not in self.cancelled_hand_offs, "cancelled once"
                    self.cancelled_hand_offs.add(ticket)
                case Transferred():
                    assert ticket not in self.answered
                    self.answered[ticket] = 1
                case Token(_, index, _):
                    assert self.last_words[ticket] == 0, "no token after the end"
                    assert index == self.answered[ticket], "no gap and no repeat (P2)"
                    self.answered[ticket] += 1
                    assert self.answered[ticket] <= self.limit[ticket]
                case Fail() | Finish():
                    self.last_words[ticket] += 1
                    assert self.last_words[ticket] == 1, "a leg ends once (P1)"
                case Released():
                    assert ticket not in self.receiving, "a link may write to these blocks (P7)"
                    assert ticket not in {row.ticket for row in self.stepping}, "a step runs"
                    self.alive.remove(ticket)

    def handle(self, event: Event) -> None:
        self.perform(self.scheduler.handle(event))

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=BLOCK * 3),
        max_tokens=st.integers(1, 12),
        ignore_eos=st.booleans(),
        patience=st.integers(1, 9),
    )
    def arrives(self, tokens: list[int], max_tokens: int, ignore_eos: bool, patience: int) -> None:
        self.attempt += 1
        ticket = Ticket("request", self.attempt, 1, 2)
        self.alive.add(ticket)
        self.ever.append(ticket)
        self.limit[ticket] = max_tokens
        stop = StopParams(max_tokens, ignore_eos)
        self.known[ticket] = tokens
        self.handle(Arrive(ticket, tuple(tokens), GREEDY, stop, self.now + patience))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def arrives_again(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.alive, key=str)))
        before = self.scheduler.tickets()
        self.handle(Arrive(ticket, (1, 2), GREEDY, StopParams(5), self.now + 9))
        assert self.scheduler.tickets() == before

    @precondition(lambda self: self.receiving)
    @rule(data=st.data(), commits=st.sampled_from([True, True, True, False]))
    def hand_off_ends(self, data: st.DataObject, commits: bool) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.receiving, key=str)))
        blocks = self.receiving.pop(ticket)
        if not commits:
            self.handle(HandOffEnded(ticket, LOST))
            return
        for place in range(len(self.known[ticket])):
            self.compute(ticket, blocks, place)
        self.known[ticket] = [*self.known[ticket], 40]
        self.handle(Committed(ticket, 40))

    def compute(self, ticket: Ticket, blocks: tuple[int, ...], place: int) -> None:
        self.memory[blocks[place // BLOCK], place % BLOCK] = tuple(self.known[ticket][: place + 1])

    @precondition(lambda self: not self.stepping)
    @rule()
    def step_begins(self) -> None:
        planned = self.scheduler.next_step()
        self.stepping = planned.rows
        assert len(self.stepping) <= MOST
        assert sum(len(row.token_ids) for row in self.stepping) <= BUDGET
        running = self.scheduler.count(LegState.RUNNING)
        stuck = running and not self.stepping
        assert not stuck or self.receiving, "only a hand-off can hold all legs up, for it ends"
        for row in self.stepping:
            assert row.block_table == self.pool.owned(row.ticket)
            stop = row.start + len(row.token_ids)
            assert stop + row.guesses <= len(row.block_table) * BLOCK, "there is room for its KV"
            assert list(row.token_ids) == self.known[row.ticket][row.start : stop]
            assert row.last == (stop == len(self.known[row.ticket]))
            for place in range(row.start):
                slot = (row.block_table[place // BLOCK], place % BLOCK)
                kv = tuple(self.known[row.ticket][: place + 1])
                assert self.memory.get(slot) == kv, "a row reads what is not its own KV"

    @precondition(lambda self: self.stepping)
    @rule(token_ids=st.lists(st.sampled_from([EOS, 0, 1]), min_size=6, max_size=6))
    def step_ends(self, token_ids: list[int]) -> None:
        rows, self.stepping = self.stepping, ()
        chosen: dict[Ticket, tuple[int, ...]] = {}
        for number, row in enumerate(rows):
            some = token_ids[3 * number : 3 * number + 3]
            chosen[row.ticket] = tuple(some[: 1 + row.guesses]) if row.last else ()
            for place in range(row.start, row.start + len(row.token_ids)):
                self.compute(row.ticket, row.block_table, place)
            self.known[row.ticket] += chosen[row.ticket]
            for place in range(
                len(self.known[row.ticket]) - len(chosen[row.ticket]),
                len(self.known[row.ticket]) - 1,
            ):
                self.compute(row.ticket, row.block_table, place)
        self.handle(StepDone(chosen))

    @precondition(lambda self: self.stepping)
    @rule()
    def step_fails(self) -> None:
        rows, self.stepping = self.stepping, ()
        for row in rows:  # it may have written anything where it was to write
            for place in range(row.start, len(row.block_table) * BLOCK):
                self.memory.pop((row.block_table[place // BLOCK], place % BLOCK), None)
        self.handle(StepFailed(BROKEN))

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
        for ticket, blocks in self.receiving.items():
            assert self.pool.owned(ticket) == blocks
        for row in self.stepping:
            assert self.pool.owned(row.ticket) == row.block_table

    def teardown(self) -> None:
        """Cancel everything and let everything end: nothing is left over (P5)."""
        while self.alive:  # a release may let a waiting leg in
            for ticket in sorted(self.alive, key=str):
                self.handle(Cancel(ticket, GONE))
            if self.stepping:
                rows, self.stepping = self.stepping, ()
                self.handle(done(Step(rows)))
            for ticket in list(self.receiving):
                del self.receiving[ticket]
                self.handle(HandOffEnded(ticket, GONE))
            self.nothing_is_released_while_used()
        assert self.pool.leased == 0


TestNode = Node.TestCase
TestNode.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
