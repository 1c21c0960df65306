"""The sender's table: the hand-offs that a prefill node makes. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from baton.errors import BatonError
from baton.ids import Ticket
from kvtransfer.layout import Unit
from kvtransfer.protocol.events import (
    Accepted,
    Action,
    Begin,
    Cancel,
    Committed,
    Computed,
    FenceLink,
    LinkEnded,
    LinkFenced,
    PeerEnded,
    QueueDone,
    QueueUnit,
    Release,
    SendAbort,
    SenderEvent,
    SendOffer,
    UnitReady,
    cancel_expired,
)


class SenderState(Enum):
    OFFERED = auto()  # waits for the receiver; computed units wait here
    SENDING = auto()  # units go to the link as they are computed
    DRAINING = auto()  # everything is computed and given to the link
    FENCING = auto()  # ended; the link thread may still read the blocks


@dataclass(slots=True)
class _Sending:
    deadline: float
    state: SenderState = SenderState.OFFERED
    waiting: list[Unit] = field(default_factory=list)
    first_token_id: int | None = None
    error: BatonError | None = None


class Sender:
    """The hand-offs that this node sends.

    Begin ─▶ OFFERED ─Accepted─▶ SENDING ─Computed─▶ DRAINING ─Committed─▶ Release(None)
                └────────┬──────────┴───────────────────┘
             Cancel, PeerEnded, deadline ─▶ FENCING ─LinkFenced─▶ Release(error)
                    LinkEnded, in any state ─────────────────────▶ Release(error)
    """

    def __init__(self) -> None:
        self._live: dict[Ticket, _Sending] = {}
        self._table: dict[
            tuple[SenderState, type[SenderEvent]],
            Callable[[Ticket, _Sending, SenderEvent], list[Action]],
        ] = {
            (SenderState.OFFERED, UnitReady): self._hold_unit,
            (SenderState.OFFERED, Computed): self._hold_end,
            (SenderState.OFFERED, Accepted): self._start_sending,
            (SenderState.SENDING, UnitReady): self._queue_unit,
            (SenderState.SENDING, Computed): self._queue_end,
            (SenderState.DRAINING, Committed): self._finish,
            (SenderState.FENCING, LinkFenced): self._finish,
        }
        for state in (SenderState.OFFERED, SenderState.SENDING, SenderState.DRAINING):
            self._table[state, Cancel] = self._abort
            self._table[state, PeerEnded] = self._fence
        for state in SenderState:
            self._table[state, LinkEnded] = self._link_ended

    def handle(self, event: SenderEvent) -> list[Action]:
        """Take one event in; events that have no place in the table change nothing (rule 5)."""
        ticket = event.ticket
        record = self._live.get(ticket)
        if isinstance(event, Begin):
            if record is not None:
                raise ValueError(f"{ticket} is being sent already")
            self._live[ticket] = _Sending(event.deadline)
            return [SendOffer(ticket)]
        if record is None:
            return []
        move = self._table.get((record.state, type(event)))
        return move(ticket, record, event) if move else []

    def tick(self, now: float) -> list[Action]:
        """Fence what has passed its deadline (rule 6)."""
        return cancel_expired(self.handle, self._live_deadlines(), now)

    def state(self, ticket: Ticket) -> SenderState | None:
        record = self._live.get(ticket)
        return record.state if record else None

    def __len__(self) -> int:
        return len(self._live)

    def check_invariants(self) -> None:
        for record in self._live.values():
            if record.state is not SenderState.OFFERED:
                assert not record.waiting, "an accepted ticket holds no units back"
            assert (record.error is not None) == (record.state is SenderState.FENCING)

    def _live_deadlines(self) -> Iterable[tuple[Ticket, float]]:
        return [
            (ticket, record.deadline)
            for ticket, record in self._live.items()
            if record.state is not SenderState.FENCING
        ]

    def _hold_unit(self, _: Ticket, record: _Sending, event: SenderEvent) -> list[Action]:
        assert isinstance(event, UnitReady)
        record.waiting.append(event.unit)
        return []

    def _hold_end(self, _: Ticket, record: _Sending, event: SenderEvent) -> list[Action]:
        assert isinstance(event, Computed)
        record.first_token_id = event.first_token_id
        return []

    def _start_sending(self, ticket: Ticket, record: _Sending, _: SenderEvent) -> list[Action]:
        actions: list[Action] = [QueueUnit(ticket, unit) for unit in record.waiting]
        record.waiting.clear()
        record.state = SenderState.SENDING
        if record.first_token_id is not None:
            record.state = SenderState.DRAINING
            actions.append(QueueDone(ticket, record.first_token_id))
        return actions

    def _queue_unit(self, ticket: Ticket, _: _Sending, event: SenderEvent) -> list[Action]:
        assert isinstance(event, UnitReady)
        return [QueueUnit(ticket, event.unit)]

    def _queue_end(self, ticket: Ticket, record: _Sending, event: SenderEvent) -> list[Action]:
        assert isinstance(event, Computed)
        record.state = SenderState.DRAINING
        return [QueueDone(ticket, event.first_token_id)]

    def _abort(self, ticket: Ticket, record: _Sending, event: SenderEvent) -> list[Action]:
        assert isinstance(event, Cancel)
        return [SendAbort(ticket, event.error), *self._fence(ticket, record, event)]

    def _fence(self, ticket: Ticket, record: _Sending, event: SenderEvent) -> list[Action]:
        assert isinstance(event, Cancel | PeerEnded)
        record.state = SenderState.FENCING
        record.error = event.error
        record.waiting.clear()
        return [FenceLink(ticket)]

    def _finish(self, ticket: Ticket, record: _Sending, _: SenderEvent) -> list[Action]:
        del self._live[ticket]
        return [Release(ticket, record.error)]

    def _link_ended(self, ticket: Ticket, record: _Sending, event: SenderEvent) -> list[Action]:
        assert isinstance(event, LinkEnded)
        del self._live[ticket]
        return [Release(ticket, record.error or event.error)]
