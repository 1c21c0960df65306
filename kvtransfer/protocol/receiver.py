"""The receiver's table: the hand-offs that a decode node takes. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto

from baton.errors import BatonError, CorruptTransfer, IncompatiblePeer
from baton.ids import Ticket
from kvtransfer.layout import Coverage
from kvtransfer.protocol.events import (
    Action,
    Cancel,
    Commit,
    DoneReached,
    FenceLink,
    LinkEnded,
    LinkFenced,
    Offered,
    PeerEnded,
    ReceiverEvent,
    Release,
    Reserve,
    SendAccept,
    SendFenced,
    SendRefuse,
    UnitArrived,
    cancel_expired,
)

MAX_ENDED_TICKETS = 4096
"""Ended tickets that a receiver remembers, so that a late offer is refused."""


class ReceiverState(Enum):
    OFFERED = auto()  # the peer's offer came before the router's leg; nothing is leased
    RESERVED = auto()  # blocks are leased; waits for the peer's offer
    RECEIVING = auto()  # units arrive; nobody may read the blocks
    FENCING = auto()  # ended; the link thread may still write the blocks


@dataclass(slots=True)
class _Receiving:
    state: ReceiverState
    prompt_tokens: int
    deadline: float
    coverage: Coverage | None = None  # there from the reservation on
    error: BatonError | None = None


class Receiver:
    """The hand-offs that this node receives.

    Reserve ─▶ RESERVED ─Offered─┐
    Offered ─▶ OFFERED ──Reserve─┴▶ RECEIVING ─DoneReached─▶ Commit
                  └──────┬────────────┘
      Cancel, PeerEnded, damage, deadline ─▶ FENCING ─LinkFenced─▶ Release(error)
             LinkEnded while receiving ──────────────────────────▶ Release(error)
    """

    def __init__(self) -> None:
        self._live: dict[Ticket, _Receiving] = {}
        self._ended: OrderedDict[Ticket, BatonError | None] = OrderedDict()
        self._table: dict[
            tuple[ReceiverState, type[ReceiverEvent]],
            Callable[[Ticket, _Receiving, ReceiverEvent], list[Action]],
        ] = {
            (ReceiverState.RESERVED, Offered): self._match_offer,
            (ReceiverState.OFFERED, Reserve): self._match_reservation,
            (ReceiverState.OFFERED, Cancel): self._refuse,
            (ReceiverState.OFFERED, PeerEnded): self._forget_offer,
            (ReceiverState.OFFERED, LinkEnded): self._forget_offer,
            (ReceiverState.RESERVED, Cancel): self._give_up,
            (ReceiverState.RECEIVING, UnitArrived): self._take_unit,
            (ReceiverState.RECEIVING, DoneReached): self._commit,
            (ReceiverState.RECEIVING, Cancel): self._fence,
            (ReceiverState.RECEIVING, PeerEnded): self._fence,
            (ReceiverState.RECEIVING, LinkEnded): self._release,
            (ReceiverState.FENCING, LinkFenced): self._release,
            (ReceiverState.FENCING, LinkEnded): self._release,
        }

    def handle(self, event: ReceiverEvent) -> list[Action]:
        """Take one event in; events that have no place in the table change nothing (rule 5)."""
        ticket = event.ticket
        if ticket in self._ended:
            return self._late(event)
        record = self._live.get(ticket)
        if record is None:
            if isinstance(event, Reserve):
                self._live[ticket] = _Receiving(
                    ReceiverState.RESERVED,
                    event.prompt_tokens,
                    event.deadline,
                    Coverage(event.layers, event.prompt_tokens),
                )
            elif isinstance(event, Offered):
                self._live[ticket] = _Receiving(
                    ReceiverState.OFFERED, event.prompt_tokens, event.deadline
                )
            return []
        move = self._table.get((record.state, type(event)))
        return move(ticket, record, event) if move else []

    def tick(self, now: float) -> list[Action]:
        """Fence what has passed its deadline (rule 6)."""
        return cancel_expired(self.handle, self._live_deadlines(), now)

    def state(self, ticket: Ticket) -> ReceiverState | None:
        record = self._live.get(ticket)
        return record.state if record else None

    def __len__(self) -> int:
        return len(self._live)

    def check_invariants(self) -> None:
        assert not self._live.keys() & self._ended.keys(), "a ticket is live or ended"
        assert len(self._ended) <= MAX_ENDED_TICKETS
        for record in self._live.values():
            assert (record.coverage is None) == (record.state is ReceiverState.OFFERED)
            assert (record.error is not None) == (record.state is ReceiverState.FENCING)

    def _live_deadlines(self) -> Iterable[tuple[Ticket, float]]:
        return [
            (ticket, record.deadline)
            for ticket, record in self._live.items()
            if record.state is not ReceiverState.FENCING
        ]

    def _end(self, ticket: Ticket, error: BatonError | None) -> None:
        del self._live[ticket]
        self._ended[ticket] = error
        if len(self._ended) > MAX_ENDED_TICKETS:
            self._ended.popitem(last=False)

    def _late(self, event: ReceiverEvent) -> list[Action]:
        if isinstance(event, Reserve):
            error = self._ended[event.ticket] or IncompatiblePeer(f"{event.ticket} has ended")
            return [Release(event.ticket, error)]
        if isinstance(event, Offered):
            error = self._ended[event.ticket] or IncompatiblePeer(f"{event.ticket} has ended")
            return [SendRefuse(event.ticket, error)]
        return []

    def _match_offer(
        self, ticket: Ticket, record: _Receiving, event: ReceiverEvent
    ) -> list[Action]:
        assert isinstance(event, Offered)
        return self._start(ticket, record, event.prompt_tokens)

    def _match_reservation(
        self, ticket: Ticket, record: _Receiving, event: ReceiverEvent
    ) -> list[Action]:
        assert isinstance(event, Reserve)
        offered_tokens, record.prompt_tokens = record.prompt_tokens, event.prompt_tokens
        record.deadline = event.deadline
        record.coverage = Coverage(event.layers, event.prompt_tokens)
        return self._start(ticket, record, offered_tokens)

    def _start(self, ticket: Ticket, record: _Receiving, offered_tokens: int) -> list[Action]:
        if offered_tokens != record.prompt_tokens:
            error = IncompatiblePeer(
                f"the prefill node offers {offered_tokens} tokens, "
                f"but the router announced {record.prompt_tokens}"
            )
            self._end(ticket, error)
            return [SendRefuse(ticket, error), Release(ticket, error)]
        record.state = ReceiverState.RECEIVING
        return [SendAccept(ticket)]

    def _refuse(self, ticket: Ticket, _: _Receiving, event: ReceiverEvent) -> list[Action]:
        assert isinstance(event, Cancel)
        self._end(ticket, event.error)
        return [SendRefuse(ticket, event.error)]

    def _forget_offer(self, ticket: Ticket, _: _Receiving, event: ReceiverEvent) -> list[Action]:
        assert isinstance(event, PeerEnded | LinkEnded)
        self._end(ticket, event.error)
        return []

    def _give_up(self, ticket: Ticket, _: _Receiving, event: ReceiverEvent) -> list[Action]:
        assert isinstance(event, Cancel)
        self._end(ticket, event.error)
        return [Release(ticket, event.error)]

    def _take_unit(self, ticket: Ticket, record: _Receiving, event: ReceiverEvent) -> list[Action]:
        assert isinstance(event, UnitArrived)
        assert record.coverage is not None
        unit = event.unit
        if not event.intact:
            problem = "does not match its checksums"
        elif not record.coverage.add(unit):
            problem = "is not the next one of its layer"
        else:
            return []
        error = CorruptTransfer(
            f"the KV of layer {unit.layer}, tokens {unit.start} to {unit.stop}, {problem}"
        )
        return self._fence(ticket, record, Cancel(ticket, error))

    def _commit(self, ticket: Ticket, record: _Receiving, event: ReceiverEvent) -> list[Action]:
        assert isinstance(event, DoneReached)
        assert record.coverage is not None
        if not record.coverage.complete:
            error = CorruptTransfer("the hand-off ended before every layer of it had arrived")
            return self._fence(ticket, record, Cancel(ticket, error))
        self._end(ticket, None)
        return [Commit(ticket, event.first_token_id)]

    def _fence(self, ticket: Ticket, record: _Receiving, event: ReceiverEvent) -> list[Action]:
        assert isinstance(event, Cancel | PeerEnded)
        record.state = ReceiverState.FENCING
        record.error = event.error
        return [FenceLink(ticket), SendFenced(ticket, event.error)]

    def _release(self, ticket: Ticket, record: _Receiving, event: ReceiverEvent) -> list[Action]:
        error = record.error
        if error is None:
            assert isinstance(event, LinkEnded)
            error = event.error
        self._end(ticket, error)
        return [Release(ticket, error)]
