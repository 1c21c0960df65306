"""`baton up`: a local cluster until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time

from baton.model.catalog import locate
from launch.local import ClusterPlan, local_cluster


def run_up(options: argparse.Namespace) -> int:
    """Serve until a signal or the router's end; 0 after a signal, 1 when the router died."""
    plan = ClusterPlan(
        prefill=options.prefill,
        decode=options.decode,
        model=options.model,
        dtype=options.dtype,
        quantize=options.quantize,
        port=options.port,
        http_port=options.http_port,
        threads=options.threads,
        kv_memory_mib=options.kv_memory_mib,
        log_level=options.log_level,
        drain_timeout_s=options.drain_timeout_s,
    )
    locate(plan.model, _progress)  # once, and seen, rather than by each node
    return asyncio.run(_up(plan))


async def _up(plan: ClusterPlan) -> int:
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted.set)
    signalled = asyncio.create_task(interrupted.wait())
    serving = asyncio.create_task(_serve(plan))
    await asyncio.wait({signalled, serving}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if interrupted.is_set() and not serving.done():
        _progress("stopping: requests in flight may end first")
        with contextlib.suppress(asyncio.CancelledError):
            serving.cancel()  # also ends a start that is still under way
            await serving
        return 0
    return await serving


async def _serve(plan: ClusterPlan) -> int:
    begun = time.monotonic()
    async with local_cluster(plan, _progress) as cluster:
        _progress(f"up after {time.monotonic() - begun:.1f} s; Ctrl-C stops")
        print(f"ready grpc={cluster.grpc_address} http={cluster.http_address}", flush=True)
        await cluster.wait_router()
    _progress("the router has ended")
    return 1


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
