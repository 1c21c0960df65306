"""The decode side's shell: performs what the protocol's `Receiver` decides, for incoming links.

Serves `KvTransfer`. Everything runs on the event loop but `_receive_item`, which runs on a link's
own thread: it takes a unit's bytes into the link's staging buffer, checks them, and copies them
into the ticket's blocks, if the ticket may still be written.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio
import structlog
import torch

from baton.errors import BatonError, IncompatiblePeer, LinkLost, Overloaded
from baton.ids import Ticket
from baton.kv_layout import Layout, difference
from baton.rpc import abort_with
from baton.wire import layout_from_proto, ticket_from_proto, ticket_to_proto
from engine.kv_cache import PagedKvCache
from kvtransfer.checksum import head_checksums
from kvtransfer.layout import MAX_UNIT_BYTES, Unit
from kvtransfer.link import RECEIVER_RANK, LinkSettings, LinkThread, PairLink, open_store
from kvtransfer.manifest import read_manifest
from kvtransfer.protocol import Receiver
from kvtransfer.protocol import events as ev
from kvtransfer.wire import PROTOCOL_VERSION, ended_error
from protos import kvtransfer_pb2 as pb
from protos import kvtransfer_pb2_grpc as pb_grpc

log = structlog.get_logger()

MAX_OFFER_S = 3600.0
"""An offer waits no longer than this for the router's leg, whatever deadline it names."""

MAX_LIVE_TICKETS = 4096
"""Hand-offs that may be reserved or on offer at once; an offer beyond it is refused."""


@dataclass(frozen=True, slots=True)
class _ReceiveUnit:
    ticket: Ticket
    unit: Unit
    head_checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _ReachDone:
    ticket: Ticket
    first_token_id: int


@dataclass(frozen=True, slots=True)
class _ConfirmFence:
    ticket: Ticket


_Item = _ReceiveUnit | _ReachDone | _ConfirmFence


class Incoming(pb_grpc.KvTransferServicer):
    """All hand-offs that this node receives.

    For each ticket reserved, exactly one of `committed(ticket, first_token_id)` and
    `released(ticket, error)` is called, once.
    """

    def __init__(
        self,
        settings: LinkSettings,
        cache: PagedKvCache,
        committed: Callable[[Ticket, int], None],
        released: Callable[[Ticket, BatonError | None], None],
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._committed = committed
        self._released = released
        self._receiver = Receiver()
        self._store, self._store_address = open_store(settings.host)
        self._links: set[_IncomingLink] = set()
        self._link_of: dict[Ticket, _IncomingLink] = {}
        self.writable: dict[Ticket, Sequence[int]] = {}
        """Block tables of reserved tickets. A link's thread writes only to what it finds here, so
        taking a ticket out and hearing the thread's confirmation is the fence."""

    def reserve(
        self, ticket: Ticket, prompt_tokens: int, block_table: Sequence[int], deadline: float
    ) -> None:
        """Expect a prompt's KV and let it be written into these blocks."""
        self.writable[ticket] = block_table
        layers = self._settings.layout.layers
        self._handle(ev.Reserve(ticket, prompt_tokens, layers, deadline))

    def cancel(self, ticket: Ticket, error: BatonError) -> None:
        self._handle(ev.Cancel(ticket, error))

    def tick(self, now: float) -> None:
        actions = self._receiver.tick(now)
        self._perform(actions)
        for action in actions:
            self._forget_ended(action.ticket)

    @property
    def in_flight(self) -> int:
        return len(self._receiver)

    @property
    def links_open(self) -> int:
        return len(self._links)

    async def close(self) -> None:
        """End every link and wait for its thread."""
        links = list(self._links)
        for link in links:
            link.stop()
        await asyncio.gather(*(link.closed.wait() for link in links))

    async def Link(
        self, _requests: AsyncIterator[pb.SenderMessage], context: grpc.aio.ServicerContext
    ) -> None:
        """Serve one link: greet, then pass its control messages on until either side ends it."""
        try:
            async with asyncio.timeout(self._settings.config.link_timeout_s):
                first = await context.read()
            hello = self._check_hello(first)
        except TimeoutError:
            await abort_with(context, LinkLost("no Hello came in time"))
        except BatonError as error:
            log.warning("link refused", reason=error.message)
            await abort_with(context, error)
        link = _IncomingLink(self, self._settings, self._cache, self._store_address, hello.node_id)
        self._links.add(link)
        tasks: list[asyncio.Task[Any]] = []
        try:
            await context.write(pb.ReceiverMessage(welcome=link.welcome))
            link.start()
            tasks = [
                asyncio.create_task(self._read(link, hello, context)),
                asyncio.create_task(self._write(link, context)),
                asyncio.create_task(link.closed.wait()),
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            link.stop()

    async def _read(
        self, link: _IncomingLink, hello: pb.Hello, context: grpc.aio.ServicerContext
    ) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            self._receive(link, hello, message)

    async def _write(self, link: _IncomingLink, context: grpc.aio.ServicerContext) -> None:
        while True:
            await context.write(await link.outbox.get())

    def _check_hello(self, message: pb.SenderMessage | Any) -> pb.Hello:
        if message is grpc.aio.EOF or message.WhichOneof("message") != "hello":
            raise IncompatiblePeer("a link begins with Hello")
        hello = message.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            raise IncompatiblePeer(
                f"hand-off protocol {hello.protocol_version} there and {PROTOCOL_VERSION} here; "
                "run the same release of Baton on both nodes"
            )
        if sentence := difference(self._settings.layout, layout_from_proto(hello.layout)):
            raise IncompatiblePeer(sentence)
        return hello

    def _receive(self, link: _IncomingLink, hello: pb.Hello, message: pb.SenderMessage) -> None:
        kind = message.WhichOneof("message")
        if kind is None or kind == "hello" or link.closed.is_set():
            return  # what a link had read when it ended is taken up by nobody
        body = getattr(message, kind)
        ticket = ticket_from_proto(body.ticket)
        match kind:
            case "offer":
                self._offered(link, hello, ticket, body)
            case "unit":
                unit = Unit(body.layer, body.start, body.stop)
                link.queue(_ReceiveUnit(ticket, unit, tuple(body.head_checksums)))
            case "done" if self._link_of.get(ticket) is link:
                link.queue(_ReachDone(ticket, body.first_token_id))
            case "abort" if self._link_of.get(ticket) is link:
                self._handle(ev.PeerEnded(ticket, ended_error(body, "the prefill node")))

    def _offered(
        self, link: _IncomingLink, hello: pb.Hello, ticket: Ticket, offer: pb.Offer
    ) -> None:
        try:
            if (ticket.prefill_epoch, ticket.decode_epoch) != (hello.epoch, self._settings.epoch):
                raise IncompatiblePeer("the ticket is for another life of one of the nodes")
            if ticket in self._link_of:
                raise IncompatiblePeer("the ticket is on offer already")
            if len(self._receiver) >= MAX_LIVE_TICKETS:
                raise Overloaded("the decode node has too many hand-offs; try again later")
            manifest = read_manifest(offer.manifest, self._settings.layout)
        except BatonError as error:
            refusal = pb.Refuse(
                ticket=ticket_to_proto(ticket), code=error.code, message=error.message
            )
            link.outbox.put_nowait(pb.ReceiverMessage(refuse=refusal))
            return
        self._link_of[ticket] = link
        offered_s = min(MAX_OFFER_S, offer.deadline_s)  # in this order: NaN then counts as the most
        deadline = asyncio.get_running_loop().time() + offered_s
        self._handle(ev.Offered(ticket, manifest.prompt_tokens, deadline))

    def _handle(self, event: ev.ReceiverEvent) -> None:
        self._perform(self._receiver.handle(event))
        self._forget_ended(event.ticket)

    def _forget_ended(self, ticket: Ticket) -> None:
        if self._receiver.state(ticket) is None:
            self._link_of.pop(ticket, None)

    def _perform(self, actions: list[ev.Action]) -> None:
        for action in actions:
            ticket = action.ticket
            proto = ticket_to_proto(ticket)
            match action:
                case ev.SendAccept():
                    self._send(ticket, pb.ReceiverMessage(accept=pb.Accept(ticket=proto)))
                case ev.SendRefuse(error=error):
                    refuse = pb.Refuse(ticket=proto, code=error.code, message=error.message)
                    self._send(ticket, pb.ReceiverMessage(refuse=refuse))
                case ev.SendFenced(error=error):
                    fenced = pb.Fenced(ticket=proto, code=error.code, message=error.message)
                    self._send(ticket, pb.ReceiverMessage(fenced=fenced))
                case ev.Commit(first_token_id=first_token_id):
                    self._send(ticket, pb.ReceiverMessage(committed=pb.Committed(ticket=proto)))
                    self._committed(ticket, first_token_id)
                case ev.FenceLink():
                    self.writable.pop(ticket, None)
                    self._link_of[ticket].queue(_ConfirmFence(ticket))
                case ev.Release(error=error):
                    self.writable.pop(ticket, None)
                    self._released(ticket, error)
                case _:
                    raise AssertionError(f"a receiver does not do {action}")

    def _send(self, ticket: Ticket, message: pb.ReceiverMessage) -> None:
        self._link_of[ticket].outbox.put_nowait(message)

    def blocks_written_by(self, link: _IncomingLink, ticket: Ticket) -> Sequence[int] | None:
        """On a link's thread: where it may write this ticket's units, if anywhere.

        Only the link of the offer may, for it is the one that a fence keeps off the blocks.
        """
        return self.writable.get(ticket) if self._link_of.get(ticket) is link else None

    def link_item_done(self, event: ev.ReceiverEvent) -> None:
        """What a link's thread reports, on the loop."""
        self._handle(event)

    def link_ended(self, link: _IncomingLink, error: LinkLost | None) -> None:
        """A link's thread has ended: nothing of its tickets can be written any more."""
        reason = error or LinkLost(f"the prefill node {link.peer} closed the link")
        log.info("link ended", peer=link.peer, reason=reason.message)
        self._links.discard(link)
        # A store keeps what nobody deletes, and a link stopped before it met its peer may write its
        # key only after this: so every end sweeps what is of no open link.
        kept = tuple(f"link/{other.welcome.link_id}/" for other in self._links)
        for key in self._store.list_keys():
            if not key.startswith(kept):
                self._store.delete_key(key)
        for ticket in [t for t, of in self._link_of.items() if of is link]:
            self._handle(ev.LinkEnded(ticket, reason))
        link.closed.set()


class _IncomingLink:
    """One generation of a link from a prefill node: its outbox, its thread, its staging buffer."""

    def __init__(
        self,
        owner: Incoming,
        settings: LinkSettings,
        cache: PagedKvCache,
        store_address: str,
        peer: str,
    ) -> None:
        self.peer = peer
        self.outbox: asyncio.Queue[pb.ReceiverMessage] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.welcome = pb.Welcome(
            epoch=settings.epoch, link_id=secrets.token_hex(8), store_address=store_address
        )
        self._owner = owner
        self._settings = settings
        self._cache = cache
        self._loop = asyncio.get_running_loop()
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._thread: LinkThread[_Item] | None = None

    def start(self) -> None:
        def connect() -> PairLink:
            return PairLink(
                self.welcome.store_address,
                self.welcome.link_id,
                RECEIVER_RANK,
                self._settings.host,
                self._settings.config.link_timeout_s,
            )

        def ended(error: LinkLost | None) -> None:
            self._loop.call_soon_threadsafe(self._owner.link_ended, self, error)

        self._thread = LinkThread(f"link from {self.peer}", connect, self._receive_item, ended)

    def queue(self, item: _Item) -> None:
        assert self._thread is not None, "a link that carries tickets has been started"
        self._thread.put(item)

    def stop(self) -> None:
        """End the thread, which then reports `link_ended`; at once where it never started."""
        if self._thread is None:
            self._owner.link_ended(self, None)
        else:
            self._thread.stop()

    def _receive_item(self, link: PairLink, item: _Item) -> None:
        """On the link's thread: perform one item and report it to the loop."""
        event: ev.ReceiverEvent
        match item:
            case _ReceiveUnit(ticket, unit, checksums):
                intact = self._receive_unit(link, ticket, unit, checksums)
                if intact is None:
                    return
                event = ev.UnitArrived(ticket, unit, intact)
            case _ReachDone(ticket, first_token_id):
                self._owner.writable.pop(ticket, None)  # a unit after the end is not written
                event = ev.DoneReached(ticket, first_token_id)
            case _ConfirmFence(ticket):
                event = ev.LinkFenced(ticket)
        self._loop.call_soon_threadsafe(self._owner.link_item_done, event)

    def _receive_unit(
        self, link: PairLink, ticket: Ticket, unit: Unit, checksums: tuple[int, ...]
    ) -> bool | None:
        """Take a unit off the link; write it if it is whole and its ticket may be written.

        Returns whether it is whole, or None where its ticket may not be written: it then counts
        as never arrived, so that nothing is committed that was not written (P4).
        """
        layout: Layout = self._settings.layout
        size = layout.unit_bytes(unit.tokens)
        if not 0 < size <= MAX_UNIT_BYTES:
            raise LinkLost(f"the peer announced a unit of {size} bytes")
        if self._staging.numel() < size:
            self._staging = torch.empty(size, dtype=torch.uint8)
        received = self._staging[:size]
        link.receive(received)
        data = received.view(getattr(torch, layout.dtype)).view(
            layout.kv_heads, 2, unit.tokens, self._cache.row
        )
        block_table = self._owner.blocks_written_by(self, ticket)
        if block_table is None:
            return None
        if tuple(head_checksums(data)) != checksums:
            return False
        room = len(block_table) * self._settings.block_size
        if unit.layer < layout.layers and unit.stop <= room:
            self._cache.write_span(unit.layer, block_table, unit.start, unit.stop, data)
        return True
