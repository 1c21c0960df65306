"""The router's shell: both doors and the registry in one process, and their start and stop.

load ─▶ listen ─▶ announced, NOT_SERVING ◀─▶ SERVING while a pair of nodes is there
                             └─stop─▶ NOT_SERVING, draining ─▶ closed
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from baton.config import Config
from baton.model.catalog import locate
from baton.model.spec import ModelSpec, load_spec
from baton.model.text import TextCodec
from baton.rpc import Server
from protos import inference_pb2_grpc, registry_pb2_grpc
from router.cluster import Cluster
from router.frontend import Frontend
from router.http_gateway import make_app
from router.http_server import HttpServer
from router.inference_service import InferenceService
from router.registry_service import RegistryService

log = structlog.get_logger()

SERVICES = ("baton.v1.Inference", "baton.v1.Registry")
STATUS_EVERY_S = 60.0
STOP_GRACE_S = 0.5


async def serve(config: Config, announce: Callable[[str], None], stop: asyncio.Event) -> None:
    """Run a router until `stop` is set, then drain. Raises `BatonError` if it cannot start.

    `announce` gets one line, `ready grpc=HOST:PORT http=HOST:PORT`, once both doors listen.
    """
    spec, codec = await asyncio.to_thread(_load, config.model)
    await run_router(config, spec, codec, announce, stop)


async def run_router(
    config: Config,
    spec: ModelSpec,
    codec: TextCodec,
    announce: Callable[[str], None],
    stop: asyncio.Event,
) -> None:
    """`serve` with the model's spec and codec at hand."""
    async with contextlib.AsyncExitStack() as stack:
        cluster = Cluster(config, spec.fingerprint)
        stack.push_async_callback(cluster.close)
        frontend = Frontend(config, spec, codec, cluster)
        server = Server(config)
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(frontend), server.grpc)
        registry = RegistryService(cluster, config.lease_s)
        registry_pb2_grpc.add_RegistryServicer_to_server(registry, server.grpc)
        health = _Health(server)
        cluster.on_ready = health.update
        app = make_app(frontend, lambda: health.serving, config.max_message_bytes, config.token())
        http = HttpServer(app, config.http)

        grpc_address = await server.start(SERVICES)
        stack.push_async_callback(server.stop, STOP_GRACE_S)
        http_address = await http.start()
        stack.push_async_callback(http.stop)
        stack.push_async_callback(_drain, config, frontend, health)
        for background in (health.publish(), _log_status(frontend)):
            stack.push_async_callback(_cancel, asyncio.create_task(background))

        log.info("listening", grpc=grpc_address, http=http_address, model=spec.name)
        announce(f"ready grpc={grpc_address} http={http_address}")
        await stop.wait()


class _Health:
    """Publishes whether a request could be served; for good NOT_SERVING once it is closed."""

    def __init__(self, server: Server) -> None:
        self.serving = False
        self._server = server
        self._closed = False
        self._changed = asyncio.Event()

    def update(self, ready: bool) -> None:
        ready = ready and not self._closed
        if ready != self.serving:
            log.info("health", serving=ready)
            self.serving = ready
            self._changed.set()

    async def publish(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._server.set_serving(self.serving)

    async def close(self) -> None:
        self._closed = True
        self.update(False)
        await self._server.set_serving(False)


def _load(model: str) -> tuple[ModelSpec, TextCodec]:
    folder = locate(model, lambda line: log.info("model", progress=line))
    return load_spec(folder), TextCodec.load(folder)


async def _drain(config: Config, frontend: Frontend, health: _Health) -> None:
    """Turn NOT_SERVING first, so that nobody is sent here any more, then let requests end."""
    await health.close()
    await frontend.drain(config.drain_timeout_s)


async def _log_status(frontend: Frontend) -> None:
    while True:
        await asyncio.sleep(STATUS_EVERY_S)
        log.info("status", in_flight=frontend.in_flight, **frontend.counters)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
