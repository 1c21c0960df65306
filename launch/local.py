"""A cluster on this machine: a router and its nodes as child processes, started and ended together.

Each child holds the reading end of a pipe as its stdin and stops when the pipe closes, so no child
outlives this process, however it ends. A child's lines on stderr go to ours, with its name before
them. A node that dies is reported and does not take the others with it (P9); when the router is
gone, so is the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.errors import NoCapacity

START_TIMEOUT_S = 120.0
STOP_MARGIN_S = 5.0
MAX_LINE_BYTES = 1 << 20
LINES_KEPT = 20


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What to start. Everything not named here is the nodes' own default."""

    prefill: int = 1
    decode: int = 1
    model: str = "smollm2-135m-instruct"
    dtype: str = "float32"
    quantize: str = "none"
    port: int = 7000
    http_port: int = 8000
    threads: int = 0  # per node; 0 shares this machine's cores out
    kv_memory_mib: int = 1024  # per node
    log_level: str = "warning"
    drain_timeout_s: float = 10.0

    @property
    def threads_per_node(self) -> int:
        """Cores per computing node. More threads than cores stall each other at every barrier."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // (self.prefill + self.decode))


@dataclass(slots=True)
class Child:
    """One process of the cluster."""

    name: str
    process: asyncio.subprocess.Process
    ready: asyncio.Future[dict[str, str]]
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LINES_KEPT))
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return self.process.returncode is None


@dataclass(slots=True)
class Cluster:
    """A running cluster and where to reach it."""

    grpc_address: str
    http_address: str
    children: list[Child]

    async def wait_router(self) -> int:
        """Wait until the router ends; return its exit status."""
        return await self.children[0].process.wait()


@contextlib.asynccontextmanager
async def local_cluster(
    plan: ClusterPlan, progress: Callable[[str], None]
) -> AsyncIterator[Cluster]:
    """Start a cluster, yield it once it can serve, and leave no process behind.

    `progress` gets a line for each step of the start. Raises `NoCapacity`, with the last lines of
    the child that failed, when the cluster cannot come up.
    """
    children: list[Child] = []
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            router = await _start(plan, "router", "router", _router_flags(plan))
            children.append(router)
            addresses = await _until_ready(router, progress)
            for role, count in (("prefill", plan.prefill), ("decode", plan.decode)):
                for number in range(count):
                    flags = _node_flags(plan, addresses["grpc"])
                    children.append(await _start(plan, role, f"{role}-{number}", flags))
            progress(f"{plan.prefill} prefill and {plan.decode} decode node(s) load {plan.model}")
            await asyncio.gather(*(_until_ready(child, progress) for child in children[1:]))
            await _until_serving(addresses["grpc"])
        yield Cluster(addresses["grpc"], addresses["http"], children)
    except TimeoutError as error:
        raise NoCapacity(f"the cluster was not ready within {START_TIMEOUT_S:.0f} s") from error
    finally:
        await _stop(plan, children)


def _router_flags(plan: ClusterPlan) -> list[str]:
    return [f"--listen=127.0.0.1:{plan.port}", f"--http=127.0.0.1:{plan.http_port}"]


def _node_flags(plan: ClusterPlan, router: str) -> list[str]:
    return [
        f"--router={router}",
        f"--dtype={plan.dtype}",
        f"--quantize={plan.quantize}",
        f"--threads={plan.threads_per_node}",
        f"--kv-memory-mib={plan.kv_memory_mib}",
        f"--memory-share={1 / (plan.prefill + plan.decode):.4f}",
    ]


async def _start(plan: ClusterPlan, kind: str, name: str, flags: list[str]) -> Child:
    common = [
        f"--model={plan.model}",
        f"--log-level={plan.log_level}",
        f"--drain-timeout-s={plan.drain_timeout_s}",
        "--stop-with-parent",
    ]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "launch.cli",
        kind,
        *common,
        *flags,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C at the terminal is ours to pass on, in our order
        limit=MAX_LINE_BYTES,
    )
    child = Child(name, process, asyncio.get_running_loop().create_future())
    child.tasks = [
        asyncio.create_task(_watch_stdout(child)),
        asyncio.create_task(_relay_stderr(child)),
    ]
    return child


async def _watch_stdout(child: Child) -> None:
    assert child.process.stdout is not None
    async for line in child.process.stdout:
        words = line.decode(errors="replace").split()
        if words[:1] == ["ready"] and not child.ready.done():
            child.ready.set_result(dict(word.split("=", 1) for word in words[1:]))
    status = await child.process.wait()
    if not child.ready.done():
        await child.tasks[1]
        lines = "\n".join(child.last_lines)
        child.ready.set_exception(
            NoCapacity(f"{child.name} ended with status {status} before it could serve\n{lines}")
        )
    elif status != 0:
        print(f"[{child.name}] died with status {status}", file=sys.stderr, flush=True)


async def _relay_stderr(child: Child) -> None:
    assert child.process.stderr is not None
    async for line in child.process.stderr:
        text = line.decode(errors="replace").rstrip("\n")
        child.last_lines.append(text)
        print(f"[{child.name}] {text}", file=sys.stderr, flush=True)


async def _until_ready(child: Child, progress: Callable[[str], None]) -> dict[str, str]:
    addresses = await asyncio.shield(child.ready)
    progress(f"{child.name} is ready at {addresses['grpc']}, process {child.process.pid}")
    return addresses


async def _until_serving(address: str) -> None:
    """Wait until the router's own health says that it has a pair of nodes."""
    async with grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        async for answer in watch:
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return


async def _stop(plan: ClusterPlan, children: list[Child]) -> None:
    """End the router first, so that requests drain through nodes that live; then the nodes."""
    for group in (children[:1], children[1:]):
        for child in group:
            if child.alive:
                with contextlib.suppress(ProcessLookupError):
                    child.process.terminate()
        await asyncio.gather(*(_reap(child, plan.drain_timeout_s) for child in group))


async def _reap(child: Child, drain_timeout_s: float) -> None:
    try:
        async with asyncio.timeout(drain_timeout_s + STOP_MARGIN_S):
            await child.process.wait()
    except TimeoutError:
        print(f"[{child.name}] did not stop in time and is killed", file=sys.stderr, flush=True)
        child.process.kill()
        await child.process.wait()
    await asyncio.gather(*child.tasks, return_exceptions=True)
    if child.ready.done() and not child.ready.cancelled():
        child.ready.exception()  # it was reported, or the start has failed for another reason
