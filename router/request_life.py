"""The life of one request, from its admission to its one terminal status. Pure.

    RECEIVED ─Placed─▶ PLACED ─Started─▶ PREFILLING ─Transferred─▶ DECODING ─▶ DONE
                          └────────────────────┴──────────────────────┴─▶ FAILED (or CANCELLED)

Rules:

 1. Exactly one terminal action, `Finish` or `Fail`; after it nothing is emitted (P1).
 2. Tokens are emitted in the order of their index, without a gap or a repeat, whatever the order in
    which the two nodes' streams deliver them (P2). A node that sends a token past the answer's
    limit fails the request, so what waits for an earlier token is bounded by max_tokens.
 3. At the end every leg that could still be working is cancelled. The life is over (`Forget`) when
    both legs have said that they hold nothing, are lost with their node, or are overdue.
 4. A leg that lets go before it has done its part fails the request: nobody else will do it.
 5. Node times are durations since the node received its leg; no two clocks are ever compared.
"""

from __future__ import annotations

from enum import Enum, auto

from baton.errors import BatonError, Cancelled, Code
from baton.sampling import FinishReason
from router.life_events import (
    Action,
    CancelLeg,
    Degraded,
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


class State(Enum):
    RECEIVED = auto()
    PLACED = auto()
    PREFILLING = auto()
    DECODING = auto()
    DONE = auto()
    FAILED = auto()
    CANCELLED = auto()


TERMINAL = frozenset({State.DONE, State.FAILED, State.CANCELLED})

_MOVES: dict[State, frozenset[State]] = {
    # The two nodes' streams are not ordered with each other: the decode node may report the
    # transfer, or the prefill node its one-token answer, before `Started` is read.
    State.RECEIVED: frozenset({State.PLACED, State.FAILED, State.CANCELLED}),
    State.PLACED: frozenset({State.PREFILLING, State.DECODING}) | TERMINAL,
    State.PREFILLING: frozenset({State.DECODING}) | TERMINAL,
    State.DECODING: TERMINAL,
    State.DONE: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}

STAMPS = (
    "queued",
    "placed",
    "prefill_started",
    "first_token",
    "transfer_done",
    "first_decode",
    "finished",
)
"""The steps of a timing record, in the order in which they happen."""


MAX_REASONS = 16


class RequestLife:
    """One request. `received_at` and every `now` are of one clock, in seconds."""

    def __init__(self, received_at: float, max_tokens: int) -> None:
        self.state = State.RECEIVED
        self.degraded: list[str] = []
        """Why the request was not served as configured (P10); empty when it was."""
        self.cached_tokens = 0
        """Of the prompt, found in the prefill node's cache."""
        self._received_at = received_at
        self._max_tokens = max_tokens
        self._placed_at = received_at
        self._stamps: dict[str, float] = {}
        self._waiting: dict[int, int] = {}  # tokens that came before an earlier one
        self._next_index = 0
        self._finish: LegFinished | None = None
        self._decode_cancelled = False  # not by us, so prefill will tell why
        self._open_legs: set[Leg] = set()
        self._terminals = 0
        self._forgotten = False

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def tokens_emitted(self) -> int:
        return self._next_index

    def timing(self) -> dict[str, float | list[str]]:
        """Seconds from receipt to each step that was reached, never decreasing, and `degraded`.

        A step that a node timed is clamped to the step before it, which the router timed.
        """
        record: dict[str, float | list[str]] = {}
        latest = 0.0
        for name in STAMPS:
            if name in self._stamps:
                latest = max(latest, self._stamps[name])
                record[name] = round(latest, 6)
        record["degraded"] = list(self.degraded)
        return record

    def queued(self, now: float) -> None:
        """The request is valid and tokenised, and waits to be placed."""
        self._stamp("queued", now, now)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event in. After the end only the release of the legs matters."""
        match event:
            case LegReleased(leg):
                early = BatonError(f"the {leg} node let go of the request before its end")
                return self._leg_gone(leg, early, now, lost=False)
            case LegLost(leg, error):
                return self._leg_gone(leg, error, now, lost=True)
            case ReleaseOverdue():
                assert self.terminal, "only a request that has ended is waited for"
                self._open_legs.clear()
                return self._forget_if_over()
        if self.terminal:
            return []
        match event:
            case Placed():
                self._move(State.PLACED)
                self._placed_at = now
                self._stamp("placed", now, now)
                self._open_legs = {Leg.PREFILL, Leg.DECODE}
                return [StartLegs()]
            case Degraded(reason):
                if reason not in self.degraded and len(self.degraded) < MAX_REASONS:
                    self.degraded.append(reason)
            case Started(elapsed_s, cached_tokens):
                self.cached_tokens = cached_tokens
                if self.state is State.PLACED:
                    self._move(State.PREFILLING)
                self._stamp("prefill_started", self._placed_at + elapsed_s, now)
            case TokensArrived(leg, index, token_ids):
                return self._take_tokens(leg, index, token_ids, now)
            case Transferred(elapsed_s):
                if self.state is not State.DECODING:
                    self._move(State.DECODING)
                self._stamp("transfer_done", self._placed_at + elapsed_s, now)
            case LegFinished():
                self._finish = self._finish or event
                return self._finish_if_whole(now)
            case LegFailed(leg, error):
                return self._leg_failed(leg, error, now)
            case End(error):
                ended = State.CANCELLED if isinstance(error, Cancelled) else State.FAILED
                return self._fail(error, ended, now, spare=None)
        return []

    def check_invariants(self) -> None:
        assert all(self._next_index < i < self._max_tokens for i in self._waiting)
        assert self._next_index <= self._max_tokens
        stamps = [at for at in self.timing().values() if isinstance(at, float)]
        assert all(stamp >= 0.0 for stamp in stamps)
        assert stamps == sorted(stamps), "time does not run backwards"
        assert ("finished" in self._stamps) == self.terminal
        assert self._terminals == self.terminal, "exactly one terminal"
        assert not self._forgotten or (self.terminal and not self._open_legs)

    def _move(self, to: State) -> None:
        assert to in _MOVES[self.state], f"no way from {self.state.name} to {to.name}"
        self.state = to

    def _stamp(self, name: str, at: float, now: float) -> None:
        """Note when a step was first reached; what a node says is believed only within [0, now]."""
        self._stamps.setdefault(name, max(0.0, min(now, at) - self._received_at))

    def _take_tokens(
        self, leg: Leg, index: int, token_ids: tuple[int, ...], now: float
    ) -> list[Action]:
        if index + len(token_ids) > self._max_tokens:
            past = BatonError(f"the {leg} node sent more than {self._max_tokens} tokens")
            return self._fail(past, State.FAILED, now, spare=None)
        if leg is Leg.DECODE:
            self._stamp("first_decode", now, now)
        for position, token_id in enumerate(token_ids, start=index):
            if position >= self._next_index:
                self._waiting.setdefault(position, token_id)
        first = self._next_index
        ready: list[int] = []
        while (token := self._waiting.pop(self._next_index, None)) is not None:
            ready.append(token)
            self._next_index += 1
        if not ready:
            return []
        self._stamp("first_token", now, now)
        return [Emit(first, tuple(ready)), *self._finish_if_whole(now)]

    def _finish_if_whole(self, now: float) -> list[Action]:
        """Finish once the answer has ended and every token before its end has been emitted."""
        if self._finish is None or self._waiting:
            return []
        leg, reason = self._finish.leg, self._finish.reason
        if reason is FinishReason.LENGTH and self._next_index < self._max_tokens:
            return []
        if leg is Leg.DECODE and self._next_index == 0:
            return []  # prefill's token is still on its way
        self._end(State.DONE, now)
        actions: list[Action] = [Finish(reason)]
        if leg is Leg.PREFILL and Leg.DECODE in self._open_legs:
            actions.append(CancelLeg(Leg.DECODE, "the answer ended with its first token"))
        return actions + self._forget_if_over()

    def _leg_failed(self, leg: Leg, error: BatonError, now: float) -> list[Action]:
        handed_over = self.state is State.DECODING
        if leg is Leg.PREFILL and handed_over and self._next_index > 0:
            return []  # the baton was passed on; only the news of it did not come back
        if leg is Leg.DECODE and not handed_over and error.code is Code.CANCELLED:
            # We did not cancel it, so the prefill node did, and its own stream says why: a first
            # token that ended the answer, or a failure. That word may be a moment behind.
            self._decode_cancelled = True
            return []
        return self._fail(error, State.FAILED, now, spare=leg)

    def _fail(self, error: BatonError, state: State, now: float, spare: Leg | None) -> list[Action]:
        self._end(state, now)
        actions: list[Action] = [Fail(error)]
        actions += [
            CancelLeg(leg, error.message) for leg in sorted(self._open_legs) if leg is not spare
        ]
        return actions + self._forget_if_over()

    def _end(self, state: State, now: float) -> None:
        self._move(state)
        self._terminals += 1
        self._stamp("finished", now, now)
        self._waiting.clear()

    def _leg_gone(self, leg: Leg, error: BatonError, now: float, *, lost: bool) -> list[Action]:
        self._open_legs.discard(leg)
        if not self.terminal and self._still_owes(leg, lost):
            return self._fail(error, State.FAILED, now, spare=leg)
        return self._forget_if_over()

    def _still_owes(self, leg: Leg, lost: bool) -> bool:
        """Whether the answer needs something that only this leg could have brought."""
        if not self._open_legs:
            return True  # nobody is left to end the answer
        if leg is Leg.DECODE:
            return self._finish is None and not self._decode_cancelled
        passed_on = self.state is State.DECODING or not lost
        return self._next_index == 0 or self._decode_cancelled or not passed_on

    def _forget_if_over(self) -> list[Action]:
        if not self.terminal or self._open_legs or self._forgotten:
            return []
        self._forgotten = True
        return [Forget()]
