"""The router's stream to one life of one node: commands out, leg events in.

    connecting ─▶ connected ─stream ends, or the node stops reading─▶ waiting a little ─▶ connecting
        └────────────────────────── close ──────────────────────────┘

When a stream breaks, every leg on it is lost at once: the node cancels them too, for its end of
the stream has ended as well. A new stream begins with no command of the old one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio
import structlog

from baton.config import Config
from baton.errors import BatonError, LinkLost, remote_error
from baton.ids import Ticket
from baton.rpc import error_from_rpc, open_channel
from baton.wire import finish_from_proto, ticket_from_proto, ticket_to_proto
from protos import node_pb2, node_pb2_grpc
from router import life_events as life
from router.life_events import Leg
from router.membership import NodeInfo

log = structlog.get_logger()

MAX_COMMANDS_WAITING = 8192
FIRST_RETRY_S, MAX_RETRY_S = 0.1, 2.0

_STUBS: dict[Leg, Any] = {
    Leg.PREFILL: node_pb2_grpc.PrefillStub,
    Leg.DECODE: node_pb2_grpc.DecodeStub,
}
_COMMANDS: dict[Leg, Any] = {
    Leg.PREFILL: node_pb2.PrefillCommand,
    Leg.DECODE: node_pb2.DecodeCommand,
}


class NodeLink:
    """Holds the stream open until `close`.

    `on_event(ticket, event)` is called for each event of a leg; `on_change(node, error)` with None
    when the stream comes up, and with the reason when it breaks.
    """

    def __init__(
        self,
        node: NodeInfo,
        config: Config,
        metadata: tuple[tuple[str, str], ...],
        on_event: Callable[[Ticket, life.Event], None],
        on_change: Callable[[NodeInfo, BatonError | None], None],
    ) -> None:
        self.node = node
        self.connected = False
        self._name = f"the {node.role} node {node.node_id}"
        self._config = config
        self._metadata = metadata
        self._on_event = on_event
        self._on_change = on_change
        self._commands: asyncio.Queue[Any] = asyncio.Queue(MAX_COMMANDS_WAITING)
        self._stuck = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def start(self, command: node_pb2.PrefillStart | node_pb2.DecodeStart) -> None:
        """Send a leg to the node. Raises `LinkLost` if the stream is down or does not drain."""
        if not self._put(_COMMANDS[self.node.role](start=command)):
            raise LinkLost(f"{self._name} is not connected; try again in a second")

    def cancel(self, ticket: Ticket, reason: str) -> None:
        """Cancel a leg. Without a stream there is nothing to do: the leg ended with it."""
        cancel = node_pb2.CancelLeg(ticket=ticket_to_proto(ticket), reason=reason)
        self._put(_COMMANDS[self.node.role](cancel=cancel))

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _put(self, command: Any) -> bool:
        if not self.connected or self._stuck.is_set():
            return False
        try:
            self._commands.put_nowait(command)
        except asyncio.QueueFull:
            self._stuck.set()
            return False
        return True

    async def _run(self) -> None:
        retry_s = FIRST_RETRY_S
        async with open_channel(self.node.address, self._config.max_message_bytes) as channel:
            stub = _STUBS[self.node.role](channel)
            while True:
                error = await self._hold_stream(stub)
                if self.connected:
                    self.connected = False
                    self._on_change(self.node, error)
                    retry_s = FIRST_RETRY_S
                log.info("node stream down", node=self.node.node_id, why=error.message)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, MAX_RETRY_S)

    async def _hold_stream(self, stub: Any) -> BatonError:
        """Open the stream and serve it until it breaks; return why it did.

        The stream is only awaited inside tasks: a call that its peer cancels raises
        CancelledError, which must not pass for the cancellation of this link.
        """
        stream = stub.Run(metadata=self._metadata)
        opening = asyncio.create_task(stream.wait_for_connection())
        tasks: list[asyncio.Task[Any]] = [opening]
        try:
            await asyncio.wait(tasks, timeout=self._config.lease_s)
            if not opening.done():
                return LinkLost(f"{self._name} does not answer at {self.node.address}")
            _raise_failures(tasks)
            self._commands = asyncio.Queue(MAX_COMMANDS_WAITING)
            self._stuck.clear()
            self.connected = True
            self._on_change(self.node, None)
            tasks = [
                asyncio.create_task(self._read(stream)),
                asyncio.create_task(self._write(stream)),
                asyncio.create_task(self._stuck.wait()),
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._stuck.is_set():
                return LinkLost(f"{self._name} does not read its commands")
            _raise_failures(tasks)
        except grpc.aio.AioRpcError as failure:
            return LinkLost(f"{self._name} is lost: {error_from_rpc(failure).message}")
        except asyncio.InvalidStateError:
            return LinkLost(f"{self._name} ended its stream while it was written to")
        finally:
            stream.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return LinkLost(f"{self._name} ended its stream")

    async def _read(self, stream: Any) -> None:
        while (message := await stream.read()) is not grpc.aio.EOF:
            for event in message.events:
                self._receive(event)

    async def _write(self, stream: Any) -> None:
        while True:
            await stream.write(await self._commands.get())

    def _receive(self, message: node_pb2.LegEvent) -> None:
        event = leg_event(self.node.role, message)
        if event is not None:
            self._on_event(ticket_from_proto(message.ticket), event)


def _raise_failures(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        if task.done() and not task.cancelled():
            task.result()


def leg_event(leg: Leg, message: node_pb2.LegEvent) -> life.Event | None:
    """A node's event in the words of the request's life; None for one we do not know."""
    match message.WhichOneof("event"):
        case "started":
            return life.Started(message.elapsed_s, message.started.cached_tokens)
        case "degraded":
            return life.Degraded(message.degraded.reason[:64])
        case "tokens":
            tokens = message.tokens
            return life.TokensArrived(leg, tokens.index, tuple(tokens.token_ids))
        case "transferred":
            return life.Transferred(message.elapsed_s)
        case "finished":
            try:
                return life.LegFinished(leg, finish_from_proto(message.finished.reason))
            except ValueError as error:
                return life.LegFailed(leg, BatonError(f"the {leg} node sent an {error}"))
        case "failed":
            failed = message.failed
            return life.LegFailed(leg, remote_error(failed.code, failed.message))
        case "released":
            return life.LegReleased(leg)
    return None
