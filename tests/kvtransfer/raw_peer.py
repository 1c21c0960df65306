"""A prefill node that says to a decode node's `KvTransfer` whatever a test wants it to say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import torch

from baton.config import Config
from baton.ids import Ticket
from baton.rpc import auth_metadata, open_channel
from baton.wire import layout_to_proto, ticket_to_proto
from kvtransfer.checksum import as_bytes, head_checksums
from kvtransfer.layout import Unit
from kvtransfer.link import SENDER_RANK, PairLink
from kvtransfer.manifest import make_manifest
from kvtransfer.wire import PROTOCOL_VERSION
from protos import kvtransfer_pb2 as pb
from protos import kvtransfer_pb2_grpc as pb_grpc
from tests.kvtransfer.nodes import CHUNK_TOKENS, PREFILL_EPOCH, DecodeSide
from tests.kvtransfer.settings import HOST, PATIENCE_S, layout_of


class RawPeer:
    def __init__(self, decode: DecodeSide, stream: grpc.aio.StreamStreamCall) -> None:
        self.layout = layout_of(decode.spec, decode.cache.dtype)
        self._stream = stream
        self._link: PairLink | None = None

    async def say(self, **message: Any) -> None:
        await self._stream.write(pb.SenderMessage(**message))

    async def hello(self, **changes: Any) -> None:
        hello = pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            node_id="raw",
            epoch=PREFILL_EPOCH,
            layout=layout_to_proto(self.layout, 4),
        )
        for name, value in changes.items():
            setattr(hello, name, value)
        await self.say(hello=hello)

    async def hear(self, kind: str) -> Any:
        """The next message, which must be of this kind."""
        message = await self._stream.read()
        assert message is not grpc.aio.EOF, f"the stream ended in place of {kind}"
        assert message.WhichOneof("message") == kind, message
        return getattr(message, kind)

    async def refused(self) -> grpc.aio.AioRpcError:
        """How the whole stream was refused."""
        try:
            await self._stream.read()
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError("the stream was not refused")

    async def hang_up(self) -> None:
        await self._stream.done_writing()

    async def until_ended(self) -> None:
        while await self._stream.read() is not grpc.aio.EOF:
            pass

    async def join(self) -> None:
        """Greet and meet the decode node on the link."""
        await self.hello()
        welcome = await self.hear("welcome")
        address, link_id = welcome.store_address, welcome.link_id
        self._link = await asyncio.to_thread(
            PairLink, address, link_id, SENDER_RANK, HOST, PATIENCE_S
        )

    async def offer(self, ticket: Ticket, tokens: int, deadline_s: float = PATIENCE_S) -> None:
        manifest = make_manifest(self.layout, tokens, CHUNK_TOKENS)
        proto = ticket_to_proto(ticket)
        await self.say(offer=pb.Offer(ticket=proto, manifest=manifest, deadline_s=deadline_s))

    async def announce(self, ticket: Ticket, unit: Unit, checksums: list[int]) -> None:
        proto = ticket_to_proto(ticket)
        await self.say(
            unit=pb.Unit(
                ticket=proto,
                layer=unit.layer,
                start=unit.start,
                stop=unit.stop,
                head_checksums=checksums,
            )
        )

    async def send(self, ticket: Ticket, unit: Unit, value: float = 1.0) -> None:
        """A unit with the right checksums, all of one number."""
        assert self._link is not None
        shape = (self.layout.kv_heads, 2, unit.tokens, self.layout.head_dim)
        data = torch.full(shape, value)
        await self.announce(ticket, unit, head_checksums(data))
        await asyncio.to_thread(self._link.send, as_bytes(data))

    async def send_all(self, ticket: Ticket, tokens: int, value: float = 1.0) -> None:
        for layer in range(self.layout.layers):
            await self.send(ticket, Unit(layer, 0, tokens), value)

    async def done(self, ticket: Ticket) -> None:
        await self.say(done=pb.Done(ticket=ticket_to_proto(ticket), first_token_id=7))

    def close(self) -> None:
        self._stream.cancel()
        if self._link is not None:
            self._link.close()


@asynccontextmanager
async def raw_peer(decode: DecodeSide, token: str | None = None) -> AsyncIterator[RawPeer]:
    async with open_channel(decode.address, Config().max_message_bytes) as channel:
        peer = RawPeer(decode, pb_grpc.KvTransferStub(channel).Link(metadata=auth_metadata(token)))
        try:
            yield peer
        finally:
            peer.close()
