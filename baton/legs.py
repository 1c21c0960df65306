"""The node's end of the stream that the router drives it by.

One stream carries the legs of every request that one router has on this node. Whatever is reported
in one turn of the event loop, such as the tokens of a whole decode step, leaves in one message: a
message per token costs about fifteen times as much of a core.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio
import structlog

from baton.errors import BatonError, Cancelled
from baton.ids import Ticket
from baton.sampling import FinishReason
from baton.wire import finish_to_proto, ticket_from_proto, ticket_to_proto
from protos import node_pb2

log = structlog.get_logger()

MAX_EVENTS_WAITING = 65_536
"""A router that leaves more events than this unread loses its stream, and with it its legs."""


class _Stream:
    def __init__(self) -> None:
        self.events: list[node_pb2.LegEvent] = []
        self.ready = asyncio.Event()
        self.overflowed = asyncio.Event()

    def put(self, event: node_pb2.LegEvent) -> None:
        if len(self.events) >= MAX_EVENTS_WAITING:
            self.overflowed.set()
        else:
            self.events.append(event)
            self.ready.set()


@dataclass(slots=True)
class _Leg:
    stream: _Stream
    received_at: float


class Legs:
    """Who asked for which leg, and the way back to them.

    `start` is called with each start command and its leg's ticket, `cancel` when the router cancels
    a leg or its stream ends. Every leg must end with `released`.
    """

    def __init__(
        self,
        start: Callable[[Ticket, Any], None],
        cancel: Callable[[Ticket, BatonError], None],
    ) -> None:
        self._start, self._cancel = start, cancel
        self._legs: dict[Ticket, _Leg] = {}
        self._streams: set[_Stream] = set()
        self.idle = asyncio.Event()
        """Set while this node has no leg."""
        self.idle.set()

    @property
    def streams_open(self) -> int:
        return len(self._streams)

    async def serve(self, context: grpc.aio.ServicerContext) -> None:
        """Serve one `Run` call until the router ends it or stops reading; then end its legs."""
        stream = _Stream()
        self._streams.add(stream)
        tasks = [
            asyncio.create_task(self._read(stream, context)),
            asyncio.create_task(self._write(stream, context)),
            # On its own: a router that does not read leaves the write waiting for ever.
            asyncio.create_task(stream.overflowed.wait()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled() and task.exception() is not None:
                    log.error("the router's stream broke", exc_info=task.exception())
            if stream.overflowed.is_set():
                log.error("the router does not read its events; its stream is ended")
        finally:
            for task in tasks:
                task.cancel()
            self._streams.discard(stream)
            gone = Cancelled("the router's stream to this node ended")
            for ticket in [t for t, leg in self._legs.items() if leg.stream is stream]:
                self._cancel(ticket, gone)

    async def _read(self, stream: _Stream, context: grpc.aio.ServicerContext) -> None:
        while (command := await context.read()) is not grpc.aio.EOF:
            kind = command.WhichOneof("command")
            if kind is None:
                continue
            body = getattr(command, kind)
            ticket = ticket_from_proto(body.ticket)
            if kind == "cancel":
                self._cancel(ticket, Cancelled(body.reason or "the router cancelled this leg"))
            elif ticket not in self._legs:  # a repeated start changes nothing
                now = asyncio.get_running_loop().time()
                self._legs[ticket] = _Leg(stream, now)
                self.idle.clear()
                self._start(ticket, body)

    async def _write(self, stream: _Stream, context: grpc.aio.ServicerContext) -> None:
        while True:
            await stream.ready.wait()
            stream.ready.clear()
            events, stream.events = stream.events, []
            await context.write(node_pb2.LegEvents(events=events))

    def started(self, ticket: Ticket, cached_tokens: int) -> None:
        self._report(ticket, started=node_pb2.Started(cached_tokens=cached_tokens))

    def degraded(self, ticket: Ticket, reason: str) -> None:
        self._report(ticket, degraded=node_pb2.Degraded(reason=reason))

    def token(self, ticket: Ticket, index: int, token_id: int) -> None:
        self._report(ticket, tokens=node_pb2.Tokens(index=index, token_ids=[token_id]))

    def transferred(self, ticket: Ticket, kv_bytes: int) -> None:
        self._report(ticket, transferred=node_pb2.Transferred(kv_bytes=kv_bytes))

    def finished(self, ticket: Ticket, reason: FinishReason) -> None:
        self._report(ticket, finished=node_pb2.Finished(reason=finish_to_proto(reason)))

    def failed(self, ticket: Ticket, error: BatonError) -> None:
        self._report(ticket, failed=node_pb2.Failed(code=error.code, message=error.message))

    def released(self, ticket: Ticket) -> None:
        """Report that the leg holds nothing any more, and forget it."""
        self._report(ticket, released=node_pb2.Released())
        del self._legs[ticket]
        if not self._legs:
            self.idle.set()

    def _report(self, ticket: Ticket, **event: Any) -> None:
        leg = self._legs[ticket]
        elapsed_s = asyncio.get_running_loop().time() - leg.received_at
        leg.stream.put(
            node_pb2.LegEvent(ticket=ticket_to_proto(ticket), elapsed_s=elapsed_s, **event)
        )
