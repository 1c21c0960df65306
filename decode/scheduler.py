"""What a decode node does next: continuous batching over leased blocks. Pure.

A leg is one ticket's stay on this node:

    Arrive ─▶ WAITING ─blocks─▶ RECEIVING ─Committed─▶ RUNNING ─last token─▶ (gone)
                 └── Cancel, deadline, a failed hand-off: ENDING until no step and no link uses
                     the blocks ──────────────────────────────────────────▶ (gone)

Kept true: blocks for the whole answer are leased before the hand-off begins, so a running leg never
runs out; they are released once, when no step is running on them and the hand-off has let go of
them (P5, P7). Tokens leave in the order of their index. A leg that goes ends with `Released`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from baton.errors import BatonError, DeadlineExceeded, Overloaded
from baton.ids import Ticket
from baton.sampling import FinishReason, SamplingParams, StopParams
from engine.block_pool import BlockPool, blocks_for


@dataclass(frozen=True, slots=True)
class Arrive:
    ticket: Ticket
    prompt_tokens: int
    sampling: SamplingParams
    stop: StopParams
    deadline: float


@dataclass(frozen=True, slots=True)
class Committed:
    """The prompt's KV is whole in the leg's blocks; prefill has chosen the first token."""

    ticket: Ticket
    first_token_id: int


@dataclass(frozen=True, slots=True)
class HandOffEnded:
    """The hand-off failed or was cancelled, and writes to the blocks no more."""

    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class Cancel:
    """The router wants this leg no more."""

    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class StepDone:
    """The running step has ended with one token for each of its rows."""

    token_ids: Mapping[Ticket, int]


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The running step raised: none of its rows can go on."""

    error: BatonError


Event = Arrive | Committed | HandOffEnded | Cancel | StepDone | StepFailed


@dataclass(frozen=True, slots=True)
class Reserve:
    """Expect the prompt's KV in these blocks."""

    ticket: Ticket
    prompt_tokens: int
    block_table: tuple[int, ...]
    deadline: float


@dataclass(frozen=True, slots=True)
class CancelHandOff:
    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class Transferred:
    """Tell the router that the KV has been committed."""

    ticket: Ticket
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Token:
    """Tell the router the answer's token with this index."""

    ticket: Ticket
    index: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Tell the router that the answer is whole."""

    ticket: Ticket
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Fail:
    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class Released:
    """Tell the router that this leg holds nothing any more. Its last action."""

    ticket: Ticket


Action = Reserve | CancelHandOff | Transferred | Token | Finish | Fail | Released


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a step: feed `token_id` at `position`, choose the token after it."""

    ticket: Ticket
    token_id: int
    position: int
    block_table: tuple[int, ...]
    sampling: SamplingParams


class LegState(Enum):
    WAITING = auto()
    RECEIVING = auto()
    RUNNING = auto()
    ENDING = auto()


@dataclass(slots=True)
class _Leg:
    prompt_tokens: int
    sampling: SamplingParams
    stop: StopParams
    deadline: float
    state: LegState = LegState.WAITING
    block_table: tuple[int, ...] = ()
    receiving: bool = False  # the hand-off may still write the blocks
    last_token_id: int = -1
    answered: int = 0  # tokens of the answer so far, prefill's first one included

    @property
    def kv_tokens(self) -> int:
        """Most tokens whose KV this leg keeps: the last token of an answer is never fed."""
        return self.prompt_tokens + self.stop.max_tokens - 1


class DecodeScheduler:
    """Decides over one pool of blocks; the caller runs at most one step at a time."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        max_running: int,
        max_waiting: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._eos_token_ids = frozenset(eos_token_ids)
        self._legs: OrderedDict[Ticket, _Leg] = OrderedDict()
        self._running: frozenset[Ticket] = frozenset()

    def handle(self, event: Event) -> list[Action]:
        """Take one event in. Events of legs that are gone change nothing (P6)."""
        match event:
            case Arrive():
                return self._arrive(event)
            case StepDone(token_ids):
                return self._step_done(token_ids)
            case StepFailed(error):
                return self._step_failed(error)
        leg = self._legs.get(event.ticket)
        if leg is None:
            return []
        match event:
            case Committed(ticket, first_token_id):
                actions = self._committed(ticket, leg, first_token_id)
            case HandOffEnded(ticket, error):
                actions = self._hand_off_ended(ticket, leg, error)
            case Cancel(ticket, error):
                actions = self._end(ticket, leg, error)
        return actions + self._admit()

    def next_step(self) -> list[Row]:
        """The rows of the next step, empty when there is nothing to do.

        When more legs run than fit in a step, those served go to the end, so all take turns.
        """
        assert not self._running, "one step at a time"
        chosen = [t for t, leg in self._legs.items() if leg.state is LegState.RUNNING]
        if len(chosen) > self._max_running:
            chosen = chosen[: self._max_running]
            for ticket in chosen:
                self._legs.move_to_end(ticket)
        self._running = frozenset(chosen)
        return [self._row(ticket, self._legs[ticket]) for ticket in chosen]

    def tick(self, now: float) -> list[Action]:
        """End the legs whose deadline has passed (P1)."""
        actions: list[Action] = []
        for ticket, leg in list(self._legs.items()):
            if now >= leg.deadline and leg.state is not LegState.ENDING:
                error = DeadlineExceeded("the deadline passed on the decode node")
                actions += [Fail(ticket, error), *self._end(ticket, leg, error)]
        return actions + self._admit() if actions else []

    def tickets(self) -> list[Ticket]:
        return list(self._legs)

    def count(self, *states: LegState) -> int:
        return sum(leg.state in states for leg in self._legs.values())

    def check_invariants(self) -> None:
        self._pool.check_invariants()
        assert self._pool.leased == sum(len(leg.block_table) for leg in self._legs.values())
        assert self._running <= self._legs.keys()
        for leg in self._legs.values():
            assert leg.receiving <= (leg.state in (LegState.RECEIVING, LegState.ENDING))
            assert (leg.state is LegState.RECEIVING) <= leg.receiving
            assert bool(leg.block_table) >= (leg.state in (LegState.RECEIVING, LegState.RUNNING))
            if leg.state is LegState.RUNNING:
                assert 1 <= leg.answered < leg.stop.max_tokens

    def _row(self, ticket: Ticket, leg: _Leg) -> Row:
        position = leg.prompt_tokens + leg.answered - 1
        return Row(ticket, leg.last_token_id, position, leg.block_table, leg.sampling)

    def _arrive(self, event: Arrive) -> list[Action]:
        ticket = event.ticket
        if ticket in self._legs:
            return []  # a repeated command
        leg = _Leg(event.prompt_tokens, event.sampling, event.stop, event.deadline)
        if blocks_for(leg.kv_tokens, self._block_size) > self._pool.total:
            error = Overloaded(
                f"prompt and max_tokens need {leg.kv_tokens} tokens of KV, more than this node's "
                f"{self._pool.total * self._block_size}; raise --kv-memory-mib or lower max_tokens"
            )
            return [Fail(ticket, error), Released(ticket)]
        self._legs[ticket] = leg
        actions = self._admit()
        if self.count(LegState.WAITING) > self._max_waiting:
            del self._legs[ticket]
            error = Overloaded("the decode node's queue is full; try again later")
            return [*actions, Fail(ticket, error), Released(ticket)]
        return actions

    def _admit(self) -> list[Action]:
        """Lease blocks to waiting legs in order of arrival, until one does not fit."""
        actions: list[Action] = []
        for ticket, leg in self._legs.items():
            if leg.state is not LegState.WAITING:
                continue
            count = blocks_for(leg.kv_tokens, self._block_size)
            if count > self._pool.free:
                break
            leg.block_table = self._pool.lease(ticket, count, leg.deadline)
            leg.state = LegState.RECEIVING
            leg.receiving = True
            actions.append(Reserve(ticket, leg.prompt_tokens, leg.block_table, leg.deadline))
        return actions

    def _committed(self, ticket: Ticket, leg: _Leg, first_token_id: int) -> list[Action]:
        leg.receiving = False
        if leg.state is LegState.ENDING:
            return self._release_if_idle(ticket, leg)
        assert leg.state is LegState.RECEIVING
        leg.state = LegState.RUNNING
        leg.last_token_id = first_token_id
        leg.answered = 1
        actions: list[Action] = [Transferred(ticket, leg.prompt_tokens)]
        if leg.answered >= leg.stop.max_tokens:
            actions += [Finish(ticket, FinishReason.LENGTH), *self._end(ticket, leg, None)]
        return actions

    def _step_done(self, token_ids: Mapping[Ticket, int]) -> list[Action]:
        assert token_ids.keys() == self._running, "one token for each row of the step"
        self._running = frozenset()
        actions: list[Action] = []
        for ticket, token_id in token_ids.items():
            leg = self._legs[ticket]
            if leg.state is LegState.ENDING:
                actions += self._release_if_idle(ticket, leg)
            elif token_id in self._eos_token_ids and not leg.stop.ignore_eos:
                actions += [Finish(ticket, FinishReason.STOP), *self._end(ticket, leg, None)]
            else:
                actions.append(Token(ticket, leg.answered, token_id))
                leg.last_token_id = token_id
                leg.answered += 1
                if leg.answered >= leg.stop.max_tokens:
                    actions += [Finish(ticket, FinishReason.LENGTH), *self._end(ticket, leg, None)]
        return actions + self._admit()

    def _step_failed(self, error: BatonError) -> list[Action]:
        failed, self._running = self._running, frozenset()
        actions: list[Action] = []
        for ticket in [t for t in self._legs if t in failed]:
            leg = self._legs[ticket]
            if leg.state is not LegState.ENDING:
                actions.append(Fail(ticket, error))
            actions += self._end(ticket, leg, error)
        return actions + self._admit()

    def _hand_off_ended(self, ticket: Ticket, leg: _Leg, error: BatonError) -> list[Action]:
        leg.receiving = False
        actions: list[Action] = []
        if leg.state is not LegState.ENDING:
            leg.state = LegState.ENDING
            actions.append(Fail(ticket, error))
        return actions + self._release_if_idle(ticket, leg)

    def _end(self, ticket: Ticket, leg: _Leg, error: BatonError | None) -> list[Action]:
        if leg.state is not LegState.ENDING:
            leg.state = LegState.ENDING
            if leg.receiving:
                assert error is not None, "an answer does not end before its prompt is here"
                return [CancelHandOff(ticket, error)]
        return self._release_if_idle(ticket, leg)

    def _release_if_idle(self, ticket: Ticket, leg: _Leg) -> list[Action]:
        if leg.receiving or ticket in self._running:
            return []
        if leg.block_table:
            self._pool.release(ticket)
        del self._legs[ticket]
        return [Released(ticket)]
