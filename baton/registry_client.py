"""The node's end of its lease with the router."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import grpc.aio
import structlog

from baton.config import Config
from baton.errors import Code
from baton.rpc import auth_metadata, error_from_rpc, open_channel
from protos import registry_pb2, registry_pb2_grpc

log = structlog.get_logger()

CALL_TIMEOUT_S = 5.0
RETRY_S = 0.2
_REFUSALS = (Code.FAILED_PRECONDITION, Code.UNAUTHENTICATED, Code.INVALID_ARGUMENT)


class Membership:
    """Registers a node, renews its lease, and registers anew with a router that has restarted."""

    def __init__(self, config: Config, info: registry_pb2.NodeInfo) -> None:
        self._config = config
        self._info = info
        self._channel = open_channel(config.router, config.max_message_bytes)
        self._registry = registry_pb2_grpc.RegistryStub(self._channel)
        self._metadata = auth_metadata(config.token())
        self._missed = 0  # heartbeats in a row

    async def hold_until(self, stop: asyncio.Event, joined: Callable[[], None]) -> None:
        """Hold the lease until `stop` is set; call `joined` each time the router takes us in.

        Raises `RemoteError` if the router refuses this node.
        """
        known = False
        while not stop.is_set():
            if known:
                known = await self._beat(draining=False)
            elif known := await self._register():
                joined()
            pause_s = self._config.heartbeat_s if known else RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await stop.wait()

    async def announce_drain(self) -> None:
        """Ask the router to place nothing more here."""
        await self._beat(draining=True)

    async def leave(self) -> None:
        """Give the lease back and close; a router that is gone does not matter."""
        request = registry_pb2.LeaveRequest(node_id=self._info.node_id, epoch=self._info.epoch)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._registry.Leave(request, metadata=self._metadata, timeout=1.0)
        await self._channel.close()

    async def _register(self) -> bool:
        try:
            await self._registry.Register(
                registry_pb2.RegisterRequest(node=self._info),
                metadata=self._metadata,
                timeout=CALL_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as failure:
            error = error_from_rpc(failure)
            if error.code in _REFUSALS:
                raise error from failure
            log.debug("no answer from the router", router=self._config.router, why=error.message)
            return False
        log.info("registered", router=self._config.router, address=self._info.address)
        return True

    async def _beat(self, *, draining: bool) -> bool:
        """Renew the lease. True while the router is silent: a lease outlives a lost heartbeat."""
        request = registry_pb2.HeartbeatRequest(
            node_id=self._info.node_id, epoch=self._info.epoch, draining=draining
        )
        try:
            answer = await self._registry.Heartbeat(
                request, metadata=self._metadata, timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as failure:
            self._missed += 1
            # One says little: a router that stops first is gone for a moment before we are told.
            level = logging.WARNING if self._missed > 1 and not draining else logging.INFO
            why = error_from_rpc(failure).message
            log.log(level, "heartbeat lost", missed=self._missed, why=why)
            return True
        self._missed = 0
        return bool(answer.known)
