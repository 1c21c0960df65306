"""The shell around every prefill and decode node: serve, join the router, drain, stop.

load ─▶ listen ─▶ warm up ─▶ SERVING, registered ─stop─▶ NOT_SERVING, draining ─▶ left, closed
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import grpc.aio
import structlog

from baton.cache_events import CacheNews
from baton.config import Config, join_address, split_address
from baton.errors import BatonError, NodeStopping
from baton.ids import new_epoch
from baton.registry_client import Membership
from baton.rpc import Server
from baton.wire import cache_messages
from protos import (
    common_pb2,
    node_pb2,
    node_pb2_grpc,
    registry_pb2,
)

log = structlog.get_logger()

TICK_S = 0.25
_ROLE_NAMES = {common_pb2.ROLE_PREFILL: "prefill", common_pb2.ROLE_DECODE: "decode"}


class Identity:
    """This life of this node."""

    def __init__(self, config: Config, role: common_pb2.Role) -> None:
        self.role = role
        self.role_name = _ROLE_NAMES[role]
        self.epoch = new_epoch()
        self.node_id = config.node_id or f"{self.role_name}-{self.epoch & 0xFFFFFF:06x}"
        self.link_host = config.advertise or split_address(config.listen)[0]


class Node(Protocol):
    """What a prefill or decode node gives to its shell."""

    identity: Identity

    def add_services(self, server: grpc.aio.Server) -> list[str]:
        """Add the node's own services; return their full names."""

    def info(self) -> registry_pb2.NodeInfo:
        """What the router needs to know; the shell fills in the address."""

    def status(self) -> node_pb2.NodeStatus: ...

    def cache_news(self, number: int | None) -> CacheNews:
        """What the prefix cache stored and removed from the event of this number on.

        Everything it holds where `number` is None or too old to go on from.
        """

    def tick(self, now: float) -> None:
        """Let time pass in the pure parts."""

    def cancel_all(self, error: BatonError) -> None: ...

    @property
    def idle(self) -> asyncio.Event:
        """Set while no request holds anything here."""

    async def close(self) -> None: ...


class _NodeService(node_pb2_grpc.NodeServicer):
    def __init__(self, node: Node) -> None:
        self._node = node

    async def GetStatus(
        self, request: node_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> node_pb2.NodeStatus:
        return self._node.status()

    async def WatchCache(
        self, request: node_pb2.WatchCacheRequest, context: grpc.aio.ServicerContext
    ) -> None:
        number = request.next_number if request.epoch == self._node.identity.epoch else None
        while True:
            news = self._node.cache_news(number)
            if news.anew or news.events:
                for message in cache_messages(self._node.identity.epoch, news):
                    await context.write(message)
            number = news.next_number
            await asyncio.sleep(TICK_S)


async def run_node(
    config: Config,
    node: Node,
    warm_up: Callable[[], Awaitable[None]],
    announce: Callable[[str], None],
    stop: asyncio.Event,
) -> None:
    """Serve until `stop` is set, then drain. Raises `BatonError` if the router refuses the node."""
    server = Server(config)
    names = node.add_services(server.grpc)
    node_pb2_grpc.add_NodeServicer_to_server(_NodeService(node), server.grpc)
    bound = await server.start([*names, "baton.v1.Node"])
    info = node.info()
    info.address = join_address(
        config.advertise or split_address(bound)[0], split_address(bound)[1]
    )
    await warm_up()
    await server.set_serving(True)
    ticker = asyncio.create_task(_tick(node))
    membership = Membership(config, info)
    try:
        await membership.hold_until(stop, lambda: announce(f"ready grpc={bound}"))
        await server.set_serving(False)
        await membership.announce_drain()
        await _drain(config, node)
    finally:
        await membership.leave()
        await node.close()
        ticker.cancel()
        await server.stop(grace_s=0.5)


async def _tick(node: Node) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(TICK_S)
        node.tick(loop.time())


async def _drain(config: Config, node: Node) -> None:
    """Let running requests end, up to the configured limit; then end them."""
    try:
        async with asyncio.timeout(config.drain_timeout_s):
            await node.idle.wait()
    except TimeoutError:
        log.warning("requests cut off at the end of the drain")
        node.cancel_all(NodeStopping("the node is stopping"))
