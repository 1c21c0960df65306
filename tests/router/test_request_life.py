"""The life of a request, under any order of the events that its two nodes can cause."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import Cancelled, DeadlineExceeded, EngineFailed, LinkLost
from baton.sampling import FinishReason
from router.life_events import (
    Action,
    CancelLeg,
    Emit,
    End,
    Event,
    Fail,
    Finish,
    Forget,
    Leg,
    LegFailed,
    LegFinished,
    LegLost,
    LegReleased,
    Placed,
    ReleaseOverdue,
    Started,
    StartLegs,
    TokensArrived,
    Transferred,
)
from router.request_life import RequestLife, State

P, D = Leg.PREFILL, Leg.DECODE


class Driver:
    """Feeds a life one event per tenth of a second and checks it after each."""

    def __init__(self, max_tokens: int = 8) -> None:
        self.life = RequestLife(100.0, max_tokens)
        self.now = 100.0
        self.actions: list[Action] = []

    def feed(self, *events: Event) -> list[Action]:
        fresh: list[Action] = []
        for event in events:
            self.now += 0.1
            fresh += self.life.handle(event, self.now)
            self.life.check_invariants()
        self.actions += fresh
        return fresh

    def of(self, kind: type) -> list[Action]:
        return [action for action in self.actions if isinstance(action, kind)]

    def tokens(self) -> list[int]:
        emitted: list[int] = []
        for action in self.actions:
            if isinstance(action, Emit):
                assert action.index == len(emitted), "no gap and no repeat"
                emitted += action.token_ids
        return emitted


def answer_events(tokens: Sequence[int], reason: FinishReason) -> tuple[list[Event], list[Event]]:
    """What the two nodes report of an answer of two tokens or more."""
    prefill: list[Event] = [Started(0.01), TokensArrived(P, 0, (tokens[0],)), LegReleased(P)]
    decode: list[Event] = [Transferred(0.05)]
    decode += [TokensArrived(D, i, (tokens[i],)) for i in range(1, len(tokens))]
    return prefill, [*decode, LegFinished(D, reason), LegReleased(D)]


def test_an_answer_goes_through_its_states_and_is_forgotten() -> None:
    driver = Driver()
    assert driver.feed(Placed()) == [StartLegs()]
    assert driver.life.state is State.PLACED
    driver.feed(Started(0.01))
    assert driver.life.state is State.PREFILLING
    assert driver.feed(TokensArrived(P, 0, (7,))) == [Emit(0, (7,))]
    driver.feed(LegReleased(P), Transferred(0.2))
    assert driver.life.state is State.DECODING
    assert driver.feed(TokensArrived(D, 1, (8, 9))) == [Emit(1, (8, 9))]
    assert driver.feed(LegFinished(D, FinishReason.STOP)) == [Finish(FinishReason.STOP)]
    assert driver.life.state is State.DONE
    assert driver.feed(LegReleased(D)) == [Forget()]


def test_decode_tokens_wait_for_the_first_token() -> None:
    driver = Driver()
    driver.feed(Placed(), Transferred(0.1), TokensArrived(D, 1, (8,)))
    driver.feed(LegFinished(D, FinishReason.STOP))
    assert driver.actions == [StartLegs()]
    assert driver.feed(TokensArrived(P, 0, (7,))) == [Emit(0, (7, 8)), Finish(FinishReason.STOP)]


@pytest.mark.parametrize("tokens", [(), (7,)])
def test_an_answer_that_ends_at_its_first_token_cancels_the_decode_leg(
    tokens: tuple[int, ...],
) -> None:
    driver = Driver(max_tokens=1 if tokens else 8)
    driver.feed(Placed(), Started(0.0))
    if tokens:
        driver.feed(TokensArrived(P, 0, tokens))
    reason = FinishReason.LENGTH if tokens else FinishReason.STOP
    finish, cancel = driver.feed(LegFinished(P, reason))
    assert finish == Finish(reason)
    assert isinstance(cancel, CancelLeg)
    assert cancel.leg is D
    assert driver.tokens() == list(tokens)


def test_a_decode_leg_cancelled_by_its_peer_waits_for_the_peers_word() -> None:
    driver = Driver()
    driver.feed(Placed(), LegFailed(D, Cancelled("aborted by the prefill node")), LegReleased(D))
    assert not driver.life.terminal
    assert driver.feed(LegFinished(P, FinishReason.STOP)) == [Finish(FinishReason.STOP)]
    assert driver.feed(LegReleased(P)) == [Forget()]


def test_a_peers_word_that_never_comes_fails_the_request() -> None:
    driver = Driver()
    driver.feed(Placed(), LegFailed(D, Cancelled("aborted by the prefill node")), LegReleased(D))
    driver.feed(LegReleased(P))
    assert driver.life.state is State.FAILED


def test_failure_of_one_leg_cancels_the_other_only() -> None:
    driver = Driver()
    error = EngineFailed("the step failed")
    driver.feed(Placed(), Started(0.0))
    assert driver.feed(LegFailed(P, error)) == [Fail(error), CancelLeg(D, error.message)]
    assert driver.feed(LegReleased(P)) == []
    assert driver.feed(LegReleased(D)) == [Forget()]


def test_prefill_lost_after_the_hand_off_does_not_matter() -> None:
    driver = Driver()
    driver.feed(Placed(), TokensArrived(P, 0, (7,)), Transferred(0.1))
    assert driver.feed(LegLost(P, LinkLost("gone"))) == []
    driver.feed(TokensArrived(D, 1, (8,)), LegFinished(D, FinishReason.STOP))
    assert driver.life.state is State.DONE


def test_a_leg_that_lets_go_too_early_fails_the_request_at_once() -> None:
    for leg in Leg:
        driver = Driver()
        driver.feed(Placed(), LegReleased(leg))
        assert driver.life.state is State.FAILED
        assert [a.leg for a in driver.of(CancelLeg)] == [Leg.DECODE if leg is P else P]


def test_tokens_past_the_limit_fail_the_request() -> None:
    driver = Driver(max_tokens=2)
    driver.feed(Placed(), TokensArrived(D, 1, (7, 8)))
    assert driver.life.state is State.FAILED
    assert len(driver.of(CancelLeg)) == 2


def test_cancelling_ends_both_legs_and_overdue_release_forgets() -> None:
    driver = Driver()
    driver.feed(Placed(), End(Cancelled("the client went away")))
    assert driver.life.state is State.CANCELLED
    assert {a.leg for a in driver.of(CancelLeg)} == {P, D}
    assert driver.feed(ReleaseOverdue()) == [Forget()]
    assert driver.feed(LegReleased(P), LegReleased(D), ReleaseOverdue()) == []


def test_the_timing_record_never_decreases_and_compares_no_clocks() -> None:
    driver = Driver()
    driver.life.queued(100.05)
    # The transfer's elapsed time lies before the arrival of the first token: clamped to it.
    driver.feed(Placed(), Started(99.0), TokensArrived(P, 0, (7,)), Transferred(0.001))
    driver.feed(TokensArrived(D, 1, (8,)), LegFinished(D, FinishReason.STOP))
    record = driver.life.timing()
    assert record.pop("degraded") == []
    assert list(record) == [
        "queued",
        "placed",
        "prefill_started",
        "first_token",
        "transfer_done",
        "first_decode",
        "finished",
    ]
    assert all(earlier <= later for earlier, later in pairwise(record.values()))
    assert record["prefill_started"] == pytest.approx(0.2)
    assert record["transfer_done"] == record["first_token"] == pytest.approx(0.3)


@given(st.data())
def test_any_interleaving_gives_the_whole_answer_once(data: st.DataObject) -> None:
    """Each node's stream is ordered, the two are not; any event may come twice."""
    tokens = data.draw(st.lists(st.integers(0, 99), min_size=2, max_size=6))
    reason = data.draw(st.sampled_from(FinishReason))
    max_tokens = len(tokens) + (0 if reason is FinishReason.LENGTH else 2)
    driver = Driver(max_tokens)
    driver.feed(Placed())
    streams = [list(stream) for stream in answer_events(tokens, reason)]
    while any(streams):
        stream = data.draw(st.sampled_from([stream for stream in streams if stream]))
        event = stream.pop(0)
        repeats = data.draw(st.integers(1, 2))
        driver.feed(*[event] * repeats)
    assert driver.tokens() == tokens
    assert driver.of(Finish) == [Finish(reason)]
    assert not driver.of(Fail)
    assert not driver.of(CancelLeg)
    assert driver.of(Forget) == [Forget()]


_TROUBLE: list[Event] = [
    End(Cancelled("the client went away")),
    End(DeadlineExceeded("too late")),
    LegLost(P, LinkLost("gone")),
    LegLost(D, LinkLost("gone")),
    LegFailed(P, EngineFailed("broken")),
    LegFailed(D, EngineFailed("broken")),
    LegFailed(D, Cancelled("aborted by the prefill node")),
    LegFinished(P, FinishReason.STOP),
    LegReleased(P),
    LegReleased(D),
]


@given(st.data())
def test_whatever_happens_there_is_one_terminal_and_no_leg_left(data: st.DataObject) -> None:
    tokens = list(range(10, 10 + data.draw(st.integers(2, 5))))
    driver = Driver(len(tokens))
    driver.feed(Placed())
    prefill, decode = answer_events(tokens, FinishReason.LENGTH)
    events = data.draw(
        st.lists(st.sampled_from([*prefill, *decode, *_TROUBLE]), max_size=14), label="events"
    )
    driver.feed(*events)
    driver.feed(End(DeadlineExceeded("too late")))
    assert driver.tokens() == tokens[: len(driver.tokens())], "a prefix of the answer"
    assert len(driver.of(Finish)) + len(driver.of(Fail)) == 1
    told = {a.leg for a in driver.of(CancelLeg)}
    said = {e.leg for e in events if isinstance(e, LegReleased | LegLost | LegFailed | LegFinished)}
    assert told | said == {P, D}, "every leg was cancelled or ended by itself"
    driver.feed(LegReleased(P), LegReleased(D))
    assert driver.of(Forget) == [Forget()]
