"""What a prefill node does next. Pure.

A leg is one ticket's stay on this node:

    Arrive ─▶ WAITING ─blocks─▶ COMPUTING ─last chunk─▶ HANDING_OFF ─HandOffEnded─▶ (gone)
                 └── Cancel, deadline, a failed hand-off: ENDING until no step and no link uses
                     the blocks ─────────────────────────────────────────────────▶ (gone)

Kept true: a leg's blocks are leased from COMPUTING on, and released once, when no step is running
on them and the hand-off has let go of them (P5, P7). Legs are served in the order they came, one
chunk a step. A leg that goes always ends with `Released`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, auto

from baton.errors import BatonError, Cancelled, DeadlineExceeded, Overloaded
from baton.ids import Ticket
from baton.sampling import FinishReason, StopParams
from engine.block_pool import BlockPool, blocks_for


@dataclass(frozen=True, slots=True)
class Arrive:
    ticket: Ticket
    prompt_tokens: int
    stop: StopParams
    deadline: float


@dataclass(frozen=True, slots=True)
class Cancel:
    """The router wants this leg no more."""

    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """The running step has ended; the last chunk's gives the answer's first token."""

    ticket: Ticket
    token_id: int | None


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The running step raised."""

    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class HandOffEnded:
    """The hand-off reads the blocks no more; `error` is None when it was committed."""

    ticket: Ticket
    error: BatonError | None


Event = Arrive | Cancel | ChunkDone | StepFailed | HandOffEnded


@dataclass(frozen=True, slots=True)
class BeginHandOff:
    ticket: Ticket
    block_table: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EndHandOff:
    """Everything is computed: the hand-off may end with this first token."""

    ticket: Ticket
    first_token_id: int


@dataclass(frozen=True, slots=True)
class CancelHandOff:
    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class Token:
    """Tell the router the answer's first token."""

    ticket: Ticket
    token_id: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Tell the router that the answer is whole without a decode node."""

    ticket: Ticket
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Fail:
    """Tell the router that this leg cannot go on."""

    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class Released:
    """Tell the router that this leg holds nothing any more. Its last action."""

    ticket: Ticket


Action = BeginHandOff | EndHandOff | CancelHandOff | Token | Finish | Fail | Released


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """Compute the prompt's tokens [start, stop); `last` ends the prompt and gives a token."""

    ticket: Ticket
    start: int
    stop: int
    block_table: tuple[int, ...]
    last: bool


class LegState(Enum):
    WAITING = auto()
    COMPUTING = auto()
    HANDING_OFF = auto()
    ENDING = auto()


@dataclass(slots=True)
class _Leg:
    prompt_tokens: int
    stop: StopParams
    deadline: float
    state: LegState = LegState.WAITING
    block_table: tuple[int, ...] = ()
    computed: int = 0
    handing_off: bool = False  # the hand-off may still read the blocks


class PrefillScheduler:
    """Decides over one pool of blocks; the caller runs at most one step at a time."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        chunk_tokens: int,
        max_waiting: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._chunk_tokens = chunk_tokens
        self._max_waiting = max_waiting
        self._eos_token_ids = frozenset(eos_token_ids)
        self._legs: OrderedDict[Ticket, _Leg] = OrderedDict()
        self._running: Ticket | None = None

    def handle(self, event: Event) -> list[Action]:
        """Take one event in. Events of legs that are gone change nothing (P6)."""
        if isinstance(event, Arrive):
            return self._arrive(event)
        if event.ticket == self._running and isinstance(event, ChunkDone | StepFailed):
            self._running = None
        leg = self._legs.get(event.ticket)
        if leg is None:
            return []
        match event:
            case Cancel(ticket, error):
                actions = self._end(ticket, leg, error)
            case StepFailed(ticket, error):
                actions = self._step_failed(ticket, leg, error)
            case ChunkDone(ticket, token_id):
                actions = self._chunk_done(ticket, leg, token_id)
            case HandOffEnded(ticket, error):
                actions = self._hand_off_ended(ticket, leg, error)
        return actions + self._admit()

    def next_step(self) -> ChunkPlan | None:
        """The next chunk to compute, or None. The step runs until its ChunkDone or StepFailed."""
        assert self._running is None, "one step at a time"
        for ticket, leg in self._legs.items():
            if leg.state is LegState.COMPUTING:
                self._running = ticket
                stop = min(leg.computed + self._chunk_tokens, leg.prompt_tokens)
                last = stop == leg.prompt_tokens
                return ChunkPlan(ticket, leg.computed, stop, leg.block_table, last)
        return None

    def tick(self, now: float) -> list[Action]:
        """End the legs whose deadline has passed (P1)."""
        actions: list[Action] = []
        for ticket, leg in list(self._legs.items()):
            if now >= leg.deadline and leg.state is not LegState.ENDING:
                error = DeadlineExceeded("the deadline passed on the prefill node")
                actions += [Fail(ticket, error), *self._end(ticket, leg, error)]
        return actions + self._admit() if actions else []

    def tickets(self) -> list[Ticket]:
        return list(self._legs)

    def count(self, *states: LegState) -> int:
        return sum(leg.state in states for leg in self._legs.values())

    def check_invariants(self) -> None:
        self._pool.check_invariants()
        holders = {ticket for ticket, leg in self._legs.items() if leg.block_table}
        assert self._pool.leased == sum(len(self._legs[t].block_table) for t in holders)
        for ticket, leg in self._legs.items():
            assert leg.handing_off or leg.state in (LegState.WAITING, LegState.ENDING)
            assert (leg.state is LegState.WAITING) <= (ticket not in holders)
            assert leg.computed <= leg.prompt_tokens

    def _arrive(self, event: Arrive) -> list[Action]:
        ticket = event.ticket
        if ticket in self._legs:
            return []  # a repeated command
        if blocks_for(event.prompt_tokens, self._block_size) > self._pool.total:
            error = Overloaded(
                f"the prompt's {event.prompt_tokens} tokens exceed this node's KV cache of "
                f"{self._pool.total * self._block_size}; raise --kv-memory-mib"
            )
            return [Fail(ticket, error), Released(ticket)]
        self._legs[ticket] = _Leg(event.prompt_tokens, event.stop, event.deadline)
        actions = self._admit()
        if self.count(LegState.WAITING) > self._max_waiting:
            del self._legs[ticket]
            error = Overloaded("the prefill node's queue is full; try again later")
            return [*actions, Fail(ticket, error), Released(ticket)]
        return actions

    def _admit(self) -> list[Action]:
        """Lease blocks to waiting legs in order of arrival, until one does not fit."""
        actions: list[Action] = []
        for ticket, leg in self._legs.items():
            if leg.state is not LegState.WAITING:
                continue
            count = blocks_for(leg.prompt_tokens, self._block_size)
            if count > self._pool.free:
                break
            leg.block_table = self._pool.lease(ticket, count, leg.deadline)
            leg.state = LegState.COMPUTING
            leg.handing_off = True
            actions.append(BeginHandOff(ticket, leg.block_table))
        return actions

    def _chunk_done(self, ticket: Ticket, leg: _Leg, token_id: int | None) -> list[Action]:
        if leg.state is LegState.ENDING:
            return self._release_if_idle(ticket, leg)
        leg.computed = min(leg.computed + self._chunk_tokens, leg.prompt_tokens)
        if leg.computed < leg.prompt_tokens:
            return []
        assert token_id is not None, "the last chunk gives a token"
        leg.state = LegState.HANDING_OFF
        ended = Cancelled("the answer ended with its first token")
        if token_id in self._eos_token_ids and not leg.stop.ignore_eos:
            return [Finish(ticket, FinishReason.STOP), *self._end(ticket, leg, ended)]
        if leg.stop.max_tokens == 1:
            finish = Finish(ticket, FinishReason.LENGTH)
            return [Token(ticket, token_id), finish, *self._end(ticket, leg, ended)]
        return [Token(ticket, token_id), EndHandOff(ticket, token_id)]

    def _step_failed(self, ticket: Ticket, leg: _Leg, error: BatonError) -> list[Action]:
        if leg.state is LegState.ENDING:  # the router knows already why it ends
            return self._release_if_idle(ticket, leg)
        return [Fail(ticket, error), *self._end(ticket, leg, error)]

    def _hand_off_ended(self, ticket: Ticket, leg: _Leg, error: BatonError | None) -> list[Action]:
        leg.handing_off = False
        actions: list[Action] = []
        if leg.state is not LegState.ENDING:
            leg.state = LegState.ENDING
            if error is not None:
                actions.append(Fail(ticket, error))
        return actions + self._release_if_idle(ticket, leg)

    def _end(self, ticket: Ticket, leg: _Leg, error: BatonError) -> list[Action]:
        if leg.state is LegState.ENDING:
            return self._release_if_idle(ticket, leg)
        leg.state = LegState.ENDING
        if leg.handing_off:
            return [CancelHandOff(ticket, error)]
        return self._release_if_idle(ticket, leg)

    def _release_if_idle(self, ticket: Ticket, leg: _Leg) -> list[Action]:
        if leg.handing_off or self._running == ticket:
            return []
        if leg.block_table:
            self._pool.release(ticket)
        del self._legs[ticket]
        return [Released(ticket)]
