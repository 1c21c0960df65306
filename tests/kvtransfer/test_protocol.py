"""P1, P4, P5, P6, P7: the hand-off's tables, over every order of events of one ticket."""

from __future__ import annotations

from itertools import combinations

import pytest

from baton.errors import BatonError, Cancelled, CorruptTransfer, IncompatiblePeer
from baton.ids import Ticket
from kvtransfer.protocol import Receiver, ReceiverState, Sender, SenderState
from kvtransfer.protocol import events as ev
from tests.kvtransfer.explorer import (
    FAULTS,
    LAYERS,
    TICKET,
    TOKENS,
    UNITS,
    Broken,
    World,
    explore,
)


def test_without_faults_every_order_ends_in_a_commit() -> None:
    states, endings = explore(World(faults=frozenset()))
    assert endings == {"committed"}
    assert states > 50


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_every_single_fault_at_every_moment_keeps_the_promises(fault: str) -> None:
    _, endings = explore(World(faults=frozenset({fault})))
    assert endings == {"committed", "released"}


@pytest.mark.parametrize("pair", list(combinations(sorted(FAULTS), 2)), ids=" and ".join)
def test_two_faults_at_every_pair_of_moments_keep_the_promises(pair: tuple[str, str]) -> None:
    states, endings = explore(World(faults=frozenset(pair)))
    assert endings == {"committed", "released"}
    assert states > 100


class SenderWithoutFence(Sender):
    def _fence(self, ticket: Ticket, record: object, event: ev.SenderEvent) -> list[ev.Action]:
        del self._live[ticket]
        return [ev.Release(ticket, Cancelled("at once"))]


class ReceiverWithoutFence(Receiver):
    def _fence(self, ticket: Ticket, record: object, event: ev.ReceiverEvent) -> list[ev.Action]:
        self._end(ticket, Cancelled("at once"))
        return [ev.Release(ticket, Cancelled("at once"))]


class ReceiverThatTrustsChecksums(Receiver):
    def _take_unit(
        self, ticket: Ticket, record: object, event: ev.ReceiverEvent
    ) -> list[ev.Action]:
        assert isinstance(event, ev.UnitArrived)
        return super()._take_unit(ticket, record, ev.UnitArrived(ticket, event.unit, True))  # type: ignore[arg-type]


class ReceiverWithoutCoverage(Receiver):
    def _commit(self, ticket: Ticket, record: object, event: ev.ReceiverEvent) -> list[ev.Action]:
        assert isinstance(event, ev.DoneReached)
        return [ev.Commit(ticket, event.first_token_id)]  # and forgets that it has ended


class SenderWithoutDeadline(Sender):
    def tick(self, now: float) -> list[ev.Action]:
        return []


class ReceiverWithoutDeadline(Receiver):
    def tick(self, now: float) -> list[ev.Action]:
        return []


@pytest.mark.parametrize(
    ("fault", "sender", "receiver"),
    [
        ("sender cancels", SenderWithoutFence, Receiver),
        ("receiver cancels", Sender, ReceiverWithoutFence),
        ("damage", Sender, ReceiverThatTrustsChecksums),
        ("damage", Sender, ReceiverWithoutCoverage),
        ("silence", SenderWithoutDeadline, Receiver),
        ("no prefill leg", Sender, ReceiverWithoutDeadline),
    ],
)
def test_removing_a_guard_is_found(
    fault: str, sender: type[Sender], receiver: type[Receiver]
) -> None:
    with pytest.raises(Broken, match=r"P[1457]: "):
        explore(World(faults=frozenset({fault}), sender=sender(), receiver=receiver()))


def test_late_and_foreign_messages_change_nothing() -> None:
    sender, receiver = Sender(), Receiver()
    sender.handle(ev.Begin(TICKET, 10.0))
    stale = Ticket(TICKET.request_id, TICKET.attempt + 1, 11, 22)
    for event in (ev.Accepted(stale), ev.Committed(stale), ev.PeerEnded(stale, Cancelled("x"))):
        assert sender.handle(event) == []
    assert sender.state(TICKET) is SenderState.OFFERED
    receiver.handle(ev.Reserve(TICKET, TOKENS, LAYERS, 10.0))
    assert receiver.handle(ev.UnitArrived(stale, UNITS[0], True)) == []
    assert receiver.state(TICKET) is ReceiverState.RESERVED


def test_an_offer_after_the_end_is_refused_not_left_waiting() -> None:
    receiver = Receiver()
    receiver.handle(ev.Reserve(TICKET, TOKENS, LAYERS, 10.0))
    receiver.handle(ev.Cancel(TICKET, Cancelled("gone")))
    [refusal] = receiver.handle(ev.Offered(TICKET, TOKENS, 10.0))
    assert isinstance(refusal, ev.SendRefuse)


@pytest.mark.parametrize("offer_first", [True, False])
def test_an_offer_of_another_length_is_refused(offer_first: bool) -> None:
    receiver = Receiver()
    reserve = ev.Reserve(TICKET, TOKENS, LAYERS, 10.0)
    offer = ev.Offered(TICKET, TOKENS + 1, 10.0)
    first, second = (offer, reserve) if offer_first else (reserve, offer)
    assert receiver.handle(first) == []
    refusal, release = receiver.handle(second)
    assert isinstance(refusal, ev.SendRefuse)
    assert isinstance(release, ev.Release)
    assert isinstance(release.error, IncompatiblePeer)


def _receiving() -> Receiver:
    receiver = Receiver()
    receiver.handle(ev.Reserve(TICKET, TOKENS, LAYERS, 10.0))
    receiver.handle(ev.Offered(TICKET, TOKENS, 10.0))
    return receiver


def _fenced_with(actions: list[ev.Action]) -> BatonError:
    fence, fenced = actions
    assert isinstance(fence, ev.FenceLink)
    assert isinstance(fenced, ev.SendFenced)
    return fenced.error


def test_a_unit_out_of_its_place_fences_the_ticket() -> None:
    receiver = _receiving()
    receiver.handle(ev.UnitArrived(TICKET, UNITS[0], True))
    error = _fenced_with(receiver.handle(ev.UnitArrived(TICKET, UNITS[0], True)))
    assert isinstance(error, CorruptTransfer)
    assert "layer 0" in error.message


def test_an_early_end_is_not_a_commit() -> None:
    receiver = _receiving()
    receiver.handle(ev.UnitArrived(TICKET, UNITS[0], True))
    error = _fenced_with(receiver.handle(ev.DoneReached(TICKET, 1)))
    assert isinstance(error, CorruptTransfer)


def test_a_ticket_is_begun_once() -> None:
    sender = Sender()
    sender.handle(ev.Begin(TICKET, 10.0))
    with pytest.raises(ValueError, match="already"):
        sender.handle(ev.Begin(TICKET, 10.0))
