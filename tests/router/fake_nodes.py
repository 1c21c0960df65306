"""A real router on loopback with nodes that answer by script: real gRPC, no model.

A fake node takes the `Run` stream of its role. While `script` is set it plays it for every leg it
is given; otherwise the test sends each event itself. What it was told waits in queues.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from baton.client import AsyncClient
from baton.config import Config
from baton.kv_layout import Layout
from baton.rpc import auth_metadata
from baton.wire import layout_to_proto
from protos import common_pb2, node_pb2, node_pb2_grpc, registry_pb2, registry_pb2_grpc
from router.life_events import Leg
from router.server import run_router
from tests.router.samples import LAYOUT, SPEC, LettersCodec

LIMIT_S = 10.0
"""Longest a test may take; every wait ends by it."""

Script = Callable[["FakeNode", common_pb2.Ticket], None]


def run_async(work: Coroutine[Any, Any, None]) -> None:
    """Run one test's coroutine under the limit; nothing may fail unseen or outlive it."""
    unseen: list[dict[str, Any]] = []

    def note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # gRPC has one poller per process, which may still call into the loop of an earlier test.
        if "PollerCompletionQueue" not in context["message"]:
            unseen.append(context)

    async def limited() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(note)
        async with asyncio.timeout(LIMIT_S):
            await work
            await _until_no_task_of_ours()

    asyncio.run(limited())
    assert not unseen, unseen


async def _until_no_task_of_ours() -> None:
    """Wait for the tasks that the router and the test made; raises TimeoutError if one stays."""
    while left := [task for task in asyncio.all_tasks() if _is_ours(task)]:
        await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)


def _is_ours(task: asyncio.Task[Any]) -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    where = code.co_filename if code is not None else ""
    mine = task is asyncio.current_task()
    return not mine and ("/router/" in where or "/baton/" in where)


class FakeNode:
    """One node of either role."""

    def __init__(self, role: Leg, epoch: int, script: Script | None, layout: Layout) -> None:
        self.role = role
        self.epoch = epoch
        self.script = script
        self.layout = layout
        self.starts: asyncio.Queue[Any] = asyncio.Queue()
        self.cancels: asyncio.Queue[node_pb2.CancelLeg] = asyncio.Queue()
        self.metadata: dict[str, str] = {}
        self.address = ""
        self._events: asyncio.Queue[node_pb2.LegEvents] = asyncio.Queue()
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])

    async def start(self) -> None:
        if self.role is Leg.PREFILL:
            node_pb2_grpc.add_PrefillServicer_to_server(self, self._server)
        else:
            node_pb2_grpc.add_DecodeServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def stop(self) -> None:
        """Die: the streams break."""
        await self._server.stop(None)

    async def Run(self, _requests: Any, context: grpc.aio.ServicerContext) -> None:
        self.metadata = {str(key): str(value) for key, value in context.invocation_metadata()}
        writer = asyncio.create_task(self._write(context))
        try:
            while (command := await context.read()) is not grpc.aio.EOF:
                self._take(command)
        finally:
            writer.cancel()

    async def _write(self, context: grpc.aio.ServicerContext) -> None:
        while True:
            await context.write(await self._events.get())

    def _take(self, command: Any) -> None:
        if command.WhichOneof("command") == "start":
            self.starts.put_nowait(command.start)
            if self.script is not None:
                self.script(self, command.start.ticket)
        else:
            self.cancels.put_nowait(command.cancel)
            self.send(command.cancel.ticket, released=node_pb2.Released())

    def send(self, ticket: common_pb2.Ticket, elapsed_s: float = 0.001, **event: Any) -> None:
        self.send_together([node_pb2.LegEvent(ticket=ticket, elapsed_s=elapsed_s, **event)])

    def send_together(self, events: Sequence[node_pb2.LegEvent]) -> None:
        """Send several events in one message, as a decode step does."""
        self._events.put_nowait(node_pb2.LegEvents(events=events))

    def send_tokens(self, ticket: common_pb2.Ticket, index: int, token_ids: Sequence[int]) -> None:
        self.send(ticket, tokens=node_pb2.Tokens(index=index, token_ids=token_ids))

    def finish(self, ticket: common_pb2.Ticket, reason: int) -> None:
        self.send(ticket, finished=node_pb2.Finished(reason=reason))
        self.send(ticket, released=node_pb2.Released())

    def info(self) -> registry_pb2.NodeInfo:
        prefill = self.role is Leg.PREFILL
        return registry_pb2.NodeInfo(
            node_id=self.role.value,
            role=common_pb2.ROLE_PREFILL if prefill else common_pb2.ROLE_DECODE,
            epoch=self.epoch,
            address=self.address,
            layout=layout_to_proto(self.layout, 16),
            blocks_total=64,
            max_running=8,
        )


def prefill_script(first: int) -> Script:
    """Compute the prompt, choose `first`, hand over."""

    def play(node: FakeNode, ticket: common_pb2.Ticket) -> None:
        node.send(ticket, started=node_pb2.Started())
        node.send_tokens(ticket, 0, [first])
        node.send(ticket, released=node_pb2.Released())

    return play


def decode_script(rest: Sequence[int], reason: int = common_pb2.FINISH_REASON_STOP) -> Script:
    """Take over, write `rest`, end."""

    def play(node: FakeNode, ticket: common_pb2.Ticket) -> None:
        node.send(ticket, transferred=node_pb2.Transferred(kv_bytes=1))
        for index, token_id in enumerate(rest, start=1):
            node.send_tokens(ticket, index, [token_id])
        node.finish(ticket, reason)

    return play


@dataclass
class FakeCluster:
    """A router that runs in this loop, its nodes, and a client of it."""

    grpc_address: str
    http_url: str
    client: AsyncClient
    stop: asyncio.Event
    task: asyncio.Task[None]
    token: str | None = None
    nodes: dict[Leg, FakeNode] = field(default_factory=dict)

    @property
    def prefill(self) -> FakeNode:
        return self.nodes[Leg.PREFILL]

    @property
    def decode(self) -> FakeNode:
        return self.nodes[Leg.DECODE]

    async def join(self, node: FakeNode) -> None:
        await node.start()
        self.nodes[node.role] = node
        async with grpc.aio.insecure_channel(self.grpc_address) as channel:
            await registry_pb2_grpc.RegistryStub(channel).Register(
                registry_pb2.RegisterRequest(node=node.info()), metadata=auth_metadata(self.token)
            )


@contextlib.asynccontextmanager
async def running_router(token: str | None = None, **options: Any) -> AsyncIterator[FakeCluster]:
    """A router without nodes."""
    config = Config(**{"lease_s": 60.0, "drain_timeout_s": 5.0, **options})
    stop, lines = asyncio.Event(), asyncio.Queue[str]()
    task = asyncio.create_task(
        run_router(config, SPEC, LettersCodec(), lines.put_nowait, stop)  # type: ignore[arg-type]
    )
    announced = asyncio.create_task(lines.get())
    await asyncio.wait([task, announced], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        announced.cancel()
        await task
    word, *addresses = announced.result().split()
    assert word == "ready"
    found = dict(address.split("=") for address in addresses)
    async with AsyncClient(found["grpc"], token) as client:
        cluster = FakeCluster(found["grpc"], f"http://{found['http']}", client, stop, task, token)
        try:
            yield cluster
        finally:
            stop.set()
            await task
            for node in cluster.nodes.values():
                await node.stop()


@contextlib.asynccontextmanager
async def fake_cluster(
    answer: str | None = "hello",
    decode_layout: Layout = LAYOUT,
    token: str | None = None,
    **options: Any,
) -> AsyncIterator[FakeCluster]:
    """A router with a node of each role; `answer` None leaves the events to the test."""
    async with running_router(token, **options) as cluster:
        ids = [ord(letter) for letter in answer or ""]
        prefill = prefill_script(ids[0]) if answer else None
        decode = decode_script(ids[1:]) if answer else None
        await cluster.join(FakeNode(Leg.PREFILL, 11, prefill, LAYOUT))
        await cluster.join(FakeNode(Leg.DECODE, 22, decode, decode_layout))
        if decode_layout == LAYOUT:
            await cluster.client.wait_ready(5.0)
        yield cluster
