"""Every order in which one hand-off can go: two protocol tables, two link threads, one wire.

The world is the smallest that can go wrong: one ticket, two layers in one chunk, an ordered control
stream either way (gRPC keeps order until it breaks), and a thread on either side that performs its
items whenever it likes, in two steps: it looks whether it may, and then it does. Faults, each at
most once and at any moment: either side cancels, a unit is damaged, the link breaks, or falls
silent without a word, a leg of the router never comes. The explorer walks every reachable state and
checks the promises in each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from baton.errors import Cancelled, LinkLost
from baton.ids import Ticket
from kvtransfer.layout import Unit
from kvtransfer.protocol import Receiver, Sender
from kvtransfer.protocol import events as ev

TICKET = Ticket("request", 1, 11, 22)
LAYERS, TOKENS = 2, 4
FAULTS = frozenset(
    {
        "sender cancels",
        "receiver cancels",
        "damage",
        "break",
        "silence",
        "no prefill leg",
        "no decode leg",
    }
)
UNITS = [Unit(layer, 0, TOKENS) for layer in range(LAYERS)]
FIRST_TOKEN = 7
DEADLINE = 100.0


class Broken(AssertionError):
    """A promise does not hold in some reachable state."""


def promise(holds: bool, name: str) -> None:
    if not holds:
        raise Broken(name)


@dataclass
class World:
    """One state of everything. `faults` names what may still go wrong."""

    faults: frozenset[str] = FAULTS
    sender: Sender = field(default_factory=Sender)
    receiver: Receiver = field(default_factory=Receiver)
    to_receiver: list[object] = field(default_factory=list)
    to_sender: list[object] = field(default_factory=list)
    sender_items: list[object] = field(default_factory=list)
    receiver_items: list[object] = field(default_factory=list)
    sender_in_hand: Unit | None = None
    receiver_in_hand: tuple[Unit, bool, bool] | None = None  # unit, intact, may be written
    begun: bool = False
    reserved: bool = False
    prefill_leg: bool = True  # False once the router's leg to this node is lost
    decode_leg: bool = True
    computed: int = 0  # units, and then the first token
    sender_fenced: bool = False
    writable: bool = False
    damage_next: bool = False
    broken: bool = False
    silent: bool = False
    sender_thread: bool = True
    receiver_thread: bool = True
    written: frozenset[Unit] = frozenset()
    sender_released: int = 0
    receiver_released: int = 0
    committed: int = 0
    trail: tuple[str, ...] = ()

    def key(self) -> str:
        """Everything that decides what can happen next."""
        parts = {k: v for k, v in vars(self).items() if k not in ("trail", "sender", "receiver")}
        return repr((parts, memory(self.sender), memory(self.receiver)))

    def fork(self) -> World:
        """A copy that can go another way."""
        other = copy.copy(self)
        for name in ("to_receiver", "to_sender", "sender_items", "receiver_items"):
            setattr(other, name, list(getattr(self, name)))
        other.sender = type(self.sender)()
        other.receiver = type(self.receiver)()
        for ticket, sending in self.sender._live.items():
            other.sender._live[ticket] = replace(sending, waiting=list(sending.waiting))
        for ticket, receiving in self.receiver._live.items():
            coverage = copy.deepcopy(receiving.coverage)
            other.receiver._live[ticket] = replace(receiving, coverage=coverage)
        other.receiver._ended = self.receiver._ended.copy()
        return other

    # --- what the shells do with actions ---

    def perform(self, actions: list[ev.Action]) -> None:
        for action in actions:
            match action:
                case ev.SendOffer():
                    self.to_receiver.append(ev.Offered(TICKET, TOKENS, DEADLINE))
                case ev.QueueUnit(unit=unit):
                    self.sender_items.append(unit)
                case ev.QueueDone():
                    self.sender_items.append("done")
                case ev.SendAbort(error=error):
                    self.to_receiver.append(ev.PeerEnded(TICKET, error))
                case ev.SendAccept():
                    self.to_sender.append(ev.Accepted(TICKET))
                case ev.SendRefuse(error=error) | ev.SendFenced(error=error):
                    self.to_sender.append(ev.PeerEnded(TICKET, error))
                case ev.Commit():
                    self.committed += 1
                    promise(self.written == frozenset(UNITS), "P4: committed before all was in")
                    self.to_sender.append(ev.Committed(TICKET))

    def perform_sender(self, actions: list[ev.Action]) -> None:
        self.perform(actions)
        for action in actions:
            if isinstance(action, ev.FenceLink):
                self.sender_fenced = True
                self.sender_items.append("fence")
            elif isinstance(action, ev.Release):
                self.sender_released += 1

    def perform_receiver(self, actions: list[ev.Action]) -> None:
        self.perform(actions)
        for action in actions:
            if isinstance(action, ev.FenceLink):
                self.writable = False
                self.receiver_items.append("fence")
            elif isinstance(action, ev.Release):
                self.writable = False
                self.receiver_released += 1

    # --- what can happen next ---

    def moves(self) -> Iterator[tuple[str, Callable[[World], None]]]:
        if self.prefill_leg and not self.begun:
            yield "the prompt begins", World.begin
        if self.decode_leg and not self.reserved:
            yield "the decode leg reserves", World.reserve
        if self.begun and self.computed <= len(UNITS) and self.sender_released == 0:
            yield "compute goes on", World.compute
        if self.sender_thread and (self.sender_items or self.sender_in_hand):
            yield "the sender's thread goes on", World.sender_thread_step
        if self.receiver_thread and (self.receiver_items or self.receiver_in_hand):
            yield "the receiver's thread goes on", World.receiver_thread_step
        if self.to_receiver and not self.broken | self.silent:
            yield "a message reaches the receiver", World.deliver_to_receiver
        if self.to_sender and not self.broken | self.silent:
            yield "a message reaches the sender", World.deliver_to_sender
        if self.broken and self.sender_thread:
            yield "the sender's thread ends", World.end_sender_thread
        if self.broken and self.receiver_thread:
            yield "the receiver's thread ends", World.end_receiver_thread
        for fault in sorted(self.faults):
            if fault == "sender cancels" and self.begun:
                yield fault, World.sender_cancels
            elif fault == "receiver cancels" and self.reserved:
                yield fault, World.receiver_cancels
            elif fault == "damage":
                yield fault, World.damage
            elif fault == "break" and self.begun:
                yield fault, World.break_link
            elif fault == "silence":
                yield fault, World.fall_silent
            elif fault == "no prefill leg" and not self.begun:
                yield fault, World.lose_prefill_leg
            elif fault == "no decode leg" and not self.reserved:
                yield fault, World.lose_decode_leg

    def begin(self) -> None:
        self.begun = True
        self.perform_sender(self.sender.handle(ev.Begin(TICKET, DEADLINE)))

    def reserve(self) -> None:
        self.reserved = self.writable = True
        reservation = ev.Reserve(TICKET, TOKENS, LAYERS, DEADLINE)
        self.perform_receiver(self.receiver.handle(reservation))

    def compute(self) -> None:
        event: ev.SenderEvent = (
            ev.UnitReady(TICKET, UNITS[self.computed])
            if self.computed < len(UNITS)
            else ev.Computed(TICKET, FIRST_TOKEN)
        )
        self.computed += 1
        self.perform_sender(self.sender.handle(event))

    def sender_thread_step(self) -> None:
        if self.sender_in_hand is not None:
            promise(self.sender_released == 0, "P5: the sender read blocks it had released")
            self.to_receiver.append((self.sender_in_hand, not self.damage_next))
            self.sender_in_hand, self.damage_next = None, False
            return
        item = self.sender_items.pop(0)
        if item == "fence":
            self.perform_sender(self.sender.handle(ev.LinkFenced(TICKET)))
        elif item == "done":
            self.to_receiver.append("done")
        elif not self.sender_fenced:
            assert isinstance(item, Unit)
            self.sender_in_hand = item

    def receiver_thread_step(self) -> None:
        event: ev.ReceiverEvent
        if self.receiver_in_hand is not None:
            unit, intact, may_write = self.receiver_in_hand
            self.receiver_in_hand = None
            if intact and may_write:
                promise(self.receiver_released == 0, "P7: the receiver wrote to released blocks")
                promise(self.committed == 0, "P7: the receiver wrote to the sequence's blocks")
                self.written |= {unit}
            event = ev.UnitArrived(TICKET, unit, intact)
        else:
            item = self.receiver_items.pop(0)
            if item == "fence":
                event = ev.LinkFenced(TICKET)
            elif item == "done":
                self.writable = False
                event = ev.DoneReached(TICKET, FIRST_TOKEN)
            else:
                assert isinstance(item, tuple)
                self.receiver_in_hand = (*item, self.writable)
                return
        self.perform_receiver(self.receiver.handle(event))

    def deliver_to_receiver(self) -> None:
        message = self.to_receiver.pop(0)
        if isinstance(message, ev.Offered | ev.PeerEnded):
            self.perform_receiver(self.receiver.handle(message))
        else:
            self.receiver_items.append(message)

    def deliver_to_sender(self) -> None:
        message = self.to_sender.pop(0)
        assert isinstance(message, ev.Accepted | ev.Committed | ev.PeerEnded)
        self.perform_sender(self.sender.handle(message))

    def sender_cancels(self) -> None:
        self.faults -= {"sender cancels"}
        self.perform_sender(self.sender.handle(ev.Cancel(TICKET, Cancelled("by the sender"))))

    def receiver_cancels(self) -> None:
        self.faults -= {"receiver cancels"}
        self.perform_receiver(self.receiver.handle(ev.Cancel(TICKET, Cancelled("by the receiver"))))

    def damage(self) -> None:
        self.faults -= {"damage"}
        self.damage_next = True

    def break_link(self) -> None:
        self.faults -= {"break"}
        self.broken = True
        self.to_receiver.clear()
        self.to_sender.clear()

    def fall_silent(self) -> None:
        self.faults -= {"silence"}
        self.silent = True

    def lose_prefill_leg(self) -> None:
        self.faults -= {"no prefill leg"}
        self.prefill_leg = False

    def lose_decode_leg(self) -> None:
        self.faults -= {"no decode leg"}
        self.decode_leg = False

    def end_sender_thread(self) -> None:
        self.sender_thread, self.sender_in_hand = False, None
        self.sender_items.clear()
        self.perform_sender(self.sender.handle(ev.LinkEnded(TICKET, LinkLost("broken"))))

    def end_receiver_thread(self) -> None:
        self.receiver_thread, self.receiver_in_hand = False, None
        self.receiver_items.clear()
        if self.receiver_has_link():
            self.perform_receiver(self.receiver.handle(ev.LinkEnded(TICKET, LinkLost("broken"))))

    def receiver_has_link(self) -> bool:
        """Whether an offer tied the ticket to this link; a bare reservation is tied to none."""
        state = self.receiver.state(TICKET)
        return state is not None and state.name != "RESERVED"

    # --- what must hold ---

    def check(self) -> None:
        self.sender.check_invariants()
        self.receiver.check_invariants()
        promise(self.sender_released <= 1, "P5: the sender released twice")
        promise(self.receiver_released + self.committed <= 1, "P5: the receiver ended twice")

    def check_end(self) -> None:
        """Nothing more happens by itself: let the timers fire, then all must be over (P1, P5)."""
        self.perform_sender(self.sender.tick(DEADLINE))
        self.perform_receiver(self.receiver.tick(DEADLINE))
        while True:
            quiet = [move for name, move in self.moves() if name not in self.faults]
            if not quiet:
                break
            quiet[0](self)
        promise(self.sender_released == self.begun, "P1: the sender never released its blocks")
        ended = self.receiver_released + self.committed
        promise(ended == self.reserved, "P1: the receiver never ended")
        promise(len(self.sender) == len(self.receiver) == 0, "P5: a ticket is left over")


def memory(machine: Sender | Receiver) -> tuple[object, ...]:
    return machine._live, getattr(machine, "_ended", None)


def explore(start: World) -> tuple[int, set[str]]:
    """Walk every state reachable from `start`; return their number and the endings seen.

    Raises `Broken` with the shortest trail that leads to the broken promise.
    """
    seen = {start.key()}
    frontier = [start]
    endings: set[str] = set()
    while frontier:
        following: list[World] = []
        for world in frontier:
            quiet = True
            for name, move in world.moves():
                quiet = quiet and name in world.faults
                after = world.fork()
                after.trail += (name,)
                try:
                    move(after)
                    after.check()
                except AssertionError as error:
                    raise Broken(f"{error}\n  " + "\n  ".join(after.trail)) from error
                key = after.key()
                if key not in seen:
                    seen.add(key)
                    following.append(after)
            if quiet:
                end = world.fork()
                try:
                    end.check_end()
                except AssertionError as error:
                    raise Broken(f"{error}\n  " + "\n  ".join(world.trail)) from error
                endings.add("committed" if end.committed else "released")
        frontier = following
    return len(seen), endings
