"""The prefill side's shell: performs what the protocol's `Sender` decides, over outgoing links.

Everything here runs on the event loop but `_send_item`, which runs on a link's own thread: it packs
a unit from the cache, announces it on the control stream, and posts its bytes. Compute never waits
for a link: a computed layer is only named here, and its KV stays in leased blocks until released.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc.aio
import structlog

from baton.errors import BatonError, LinkLost, RemoteError
from baton.ids import Ticket
from baton.rpc import auth_metadata, error_from_rpc, open_channel
from baton.wire import layout_to_proto, ticket_from_proto, ticket_to_proto
from engine.kv_cache import PagedKvCache
from kvtransfer.checksum import as_bytes, head_checksums
from kvtransfer.layout import Unit
from kvtransfer.link import SENDER_RANK, LinkSettings, LinkThread, PairLink
from kvtransfer.manifest import make_manifest
from kvtransfer.protocol import Sender
from kvtransfer.protocol import events as ev
from kvtransfer.wire import PROTOCOL_VERSION, ended_error
from protos import kvtransfer_pb2 as pb
from protos import kvtransfer_pb2_grpc as pb_grpc

log = structlog.get_logger()


@dataclass(slots=True)
class _HandOff:
    """What the shell knows of one ticket: where it goes and where its KV lies."""

    link: _OutgoingLink
    prompt_tokens: int
    block_table: Sequence[int]
    deadline: float
    fenced: bool = False  # set on the loop, read by the link's thread before each unit


@dataclass(frozen=True, slots=True)
class _SendUnit:
    ticket: Ticket
    hand_off: _HandOff
    unit: Unit


@dataclass(frozen=True, slots=True)
class _SendMessage:
    """A control message that must not overtake the units before it."""

    message: pb.SenderMessage


@dataclass(frozen=True, slots=True)
class _ConfirmFence:
    ticket: Ticket


_Item = _SendUnit | _SendMessage | _ConfirmFence


class Outgoing:
    """All hand-offs that this node sends. `released` is called once for each ticket begun."""

    def __init__(
        self,
        settings: LinkSettings,
        cache: PagedKvCache,
        released: Callable[[Ticket, BatonError | None], None],
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._released = released
        self._sender = Sender()
        self._hand_offs: dict[Ticket, _HandOff] = {}
        self._links: dict[tuple[str, int], _OutgoingLink] = {}
        self._loop = asyncio.get_running_loop()

    def begin(
        self,
        ticket: Ticket,
        address: str,
        prompt_tokens: int,
        block_table: Sequence[int],
        deadline: float,
    ) -> None:
        """Offer a prompt's KV to the decode node at `address`."""
        key = (address, ticket.decode_epoch)
        link = self._links.get(key)
        if link is None:
            link = _OutgoingLink(self._settings, self._cache, key, self._handle, self._link_ended)
            self._links[key] = link
        self._hand_offs[ticket] = _HandOff(link, prompt_tokens, block_table, deadline)
        self._handle(ev.Begin(ticket, deadline))

    def unit_ready(self, ticket: Ticket, unit: Unit) -> None:
        self._handle(ev.UnitReady(ticket, unit))

    def computed(self, ticket: Ticket, first_token_id: int) -> None:
        self._handle(ev.Computed(ticket, first_token_id))

    def cancel(self, ticket: Ticket, error: BatonError) -> None:
        self._handle(ev.Cancel(ticket, error))

    def tick(self, now: float) -> None:
        self._perform(self._sender.tick(now))

    @property
    def in_flight(self) -> int:
        return len(self._sender)

    @property
    def links_open(self) -> int:
        return len(self._links)

    async def close(self) -> None:
        """End every link and wait for its thread."""
        for link in list(self._links.values()):
            link.close()
        await asyncio.gather(*(link.task for link in list(self._links.values())))

    def _handle(self, event: ev.SenderEvent) -> None:
        self._perform(self._sender.handle(event))

    def _perform(self, actions: list[ev.Action]) -> None:
        for action in actions:
            ticket = action.ticket
            hand_off = self._hand_offs[ticket]
            link = hand_off.link
            proto = ticket_to_proto(ticket)
            match action:
                case ev.SendOffer():
                    manifest = make_manifest(
                        self._settings.layout,
                        hand_off.prompt_tokens,
                        min(self._settings.config.step_tokens, hand_off.prompt_tokens),
                    )
                    remaining_s = hand_off.deadline - self._loop.time()
                    offer = pb.Offer(ticket=proto, manifest=manifest, deadline_s=remaining_s)
                    link.send_control(pb.SenderMessage(offer=offer))
                case ev.QueueUnit(unit=unit):
                    link.queue(_SendUnit(ticket, hand_off, unit))
                case ev.QueueDone(first_token_id=first_token_id):
                    done = pb.Done(ticket=proto, first_token_id=first_token_id)
                    link.queue(_SendMessage(pb.SenderMessage(done=done)))
                case ev.SendAbort(error=error):
                    abort = pb.Abort(ticket=proto, code=error.code, message=error.message)
                    link.send_control(pb.SenderMessage(abort=abort))
                case ev.FenceLink():
                    hand_off.fenced = True
                    link.queue(_ConfirmFence(ticket))
                case ev.Release(error=error):
                    del self._hand_offs[ticket]
                    self._released(ticket, error)
                case _:
                    raise AssertionError(f"a sender does not do {action}")

    def _link_ended(self, link: _OutgoingLink, error: BatonError) -> None:
        del self._links[link.key]
        log.info("link ended", peer=link.key[0], reason=error.message)
        for ticket in [t for t, hand_off in self._hand_offs.items() if hand_off.link is link]:
            self._handle(ev.LinkEnded(ticket, error))


class _OutgoingLink:
    """One generation of a link to one life of a decode node: its control stream and its thread."""

    def __init__(
        self,
        settings: LinkSettings,
        cache: PagedKvCache,
        key: tuple[str, int],
        handle: Callable[[ev.SenderEvent], None],
        ended: Callable[[_OutgoingLink, BatonError], None],
    ) -> None:
        self.key = key
        self._settings = settings
        self._cache = cache
        self._handle = handle
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[pb.SenderMessage] = asyncio.Queue()
        self._early: list[_Item] = []  # queued before the thread exists
        self._thread: LinkThread[_Item] | None = None
        self._thread_end: asyncio.Future[LinkLost | None] = self._loop.create_future()
        self._closing = False
        self.task = asyncio.create_task(self._run())

    def send_control(self, message: pb.SenderMessage) -> None:
        self._outbox.put_nowait(message)

    def queue(self, item: _Item) -> None:
        if self._thread is None:
            self._early.append(item)
        else:
            self._thread.put(item)

    def close(self) -> None:
        self._closing = True
        if self._stream is not None:
            self._stream.cancel()

    _stream: grpc.aio.StreamStreamCall | None = None

    async def _run(self) -> None:
        address, _ = self.key
        config = self._settings.config
        error: BatonError
        writer: asyncio.Task[None] | None = None
        async with open_channel(address, config.max_message_bytes) as channel:
            stream = pb_grpc.KvTransferStub(channel).Link(metadata=auth_metadata(config.token()))
            self._stream = stream
            if self._closing:  # it was closed before it took its first step
                stream.cancel()
            try:
                welcome = await self._greet(stream)
                self._start_thread(welcome)
                writer = asyncio.create_task(self._write(stream))
                error = await self._read(stream)
            except BatonError as failure:
                error = failure
            except grpc.aio.AioRpcError as failure:
                remote = error_from_rpc(failure)
                error = RemoteError(remote.code, f"the decode node {address}: {remote.message}")
            except (TimeoutError, asyncio.CancelledError, asyncio.InvalidStateError):
                # grpc.aio raises the last two when the stream is cancelled beneath its reader.
                reason = "this node is stopping" if self._closing else "it did not answer in time"
                error = LinkLost(f"the link to the decode node {address} ended: {reason}")
            finally:
                if writer is not None:
                    writer.cancel()
                stream.cancel()
            if self._thread is not None:
                self._thread.stop()
                error = await self._thread_end or error
        self._ended(self, error)

    async def _greet(self, stream: grpc.aio.StreamStreamCall) -> pb.Welcome:
        settings = self._settings
        hello = pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            node_id=settings.node_id,
            epoch=settings.epoch,
            layout=layout_to_proto(settings.layout, settings.block_size),
        )
        async with asyncio.timeout(settings.config.link_timeout_s):
            await stream.write(pb.SenderMessage(hello=hello))
            answer = await stream.read()
        if answer is grpc.aio.EOF or answer.WhichOneof("message") != "welcome":
            raise LinkLost(f"the decode node {self.key[0]} did not welcome the link")
        if answer.welcome.epoch != self.key[1]:
            raise LinkLost(f"the decode node {self.key[0]} has restarted since it was chosen")
        return answer.welcome

    def _start_thread(self, welcome: pb.Welcome) -> None:
        def connect() -> PairLink:
            return PairLink(
                welcome.store_address,
                welcome.link_id,
                SENDER_RANK,
                self._settings.host,
                self._settings.config.link_timeout_s,
            )

        def ended(error: LinkLost | None) -> None:
            self._loop.call_soon_threadsafe(self._thread_ended, error)

        self._thread = LinkThread(f"link to {self.key[0]}", connect, self._send_item, ended)
        for item in self._early:
            self._thread.put(item)
        self._early.clear()

    def _thread_ended(self, error: LinkLost | None) -> None:
        self._thread_end.set_result(error)
        if self._stream is not None:
            self._stream.cancel()

    async def _write(self, stream: grpc.aio.StreamStreamCall) -> None:
        while True:
            await stream.write(await self._outbox.get())

    async def _read(self, stream: grpc.aio.StreamStreamCall) -> BatonError:
        while (message := await stream.read()) is not grpc.aio.EOF:
            kind = message.WhichOneof("message")
            if kind is None or kind == "welcome":
                continue
            body = getattr(message, kind)
            ticket = ticket_from_proto(body.ticket)
            match kind:
                case "accept":
                    self._handle(ev.Accepted(ticket))
                case "committed":
                    self._handle(ev.Committed(ticket))
                case "refuse" | "fenced":
                    error = ended_error(body, "the decode node")
                    self._handle(ev.PeerEnded(ticket, error))
        return LinkLost(f"the decode node {self.key[0]} closed the link")

    def _send_item(self, link: PairLink, item: _Item) -> None:
        """On the link's thread: perform one item. Announce, then send, what is not fenced."""
        match item:
            case _SendUnit(ticket, hand_off, unit):
                if hand_off.fenced:
                    return
                data = self._cache.read_span(
                    unit.layer, hand_off.block_table, unit.start, unit.stop
                ).cpu()
                announcement = pb.Unit(
                    ticket=ticket_to_proto(ticket),
                    layer=unit.layer,
                    start=unit.start,
                    stop=unit.stop,
                    head_checksums=head_checksums(data),
                )
                self._announce(pb.SenderMessage(unit=announcement))
                link.send(as_bytes(data))
            case _SendMessage(message):
                self._announce(message)
            case _ConfirmFence(ticket):
                self._loop.call_soon_threadsafe(self._handle, ev.LinkFenced(ticket))

    def _announce(self, message: pb.SenderMessage) -> None:
        self._loop.call_soon_threadsafe(self.send_control, message)
