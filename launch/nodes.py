"""The entry point of one node of any kind, in the foreground: what every launch script starts.

A node prints one line `ready grpc=HOST:PORT …` on stdout when it serves, and logs to stderr. SIGINT
or SIGTERM drains it; a second one ends it at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import structlog

from baton.config import Config, NodeKind
from baton.errors import ConfigError
from baton.log import configure_logging

if TYPE_CHECKING:
    from baton.kv_layout import Layout
    from engine.runner import Runner

log = structlog.get_logger()


def run_node_process(kind: NodeKind, config: Config, *, stop_with_parent: bool) -> None:
    """Run one node until it is told to stop. Raises `BatonError` when it cannot serve."""
    configure_logging(config.log_level, role=kind)
    asyncio.run(_serve(kind, config, stop_with_parent))


async def _serve(kind: NodeKind, config: Config, stop_with_parent: bool) -> None:
    stop = asyncio.Event()
    _stop_on_signals(stop)
    if stop_with_parent:
        _stop_on_end_of_stdin(stop)
    if kind == "router":
        from router.server import serve as serve_router

        await serve_router(config, _announce, stop)
        return
    runner, layout, draft = await asyncio.to_thread(_load, kind, config)
    if kind == "prefill":
        from prefill.server import serve as serve_prefill

        await serve_prefill(config, runner, layout, _announce, stop)
    else:
        from decode.server import serve as serve_decode

        await serve_decode(config, runner, layout, _announce, stop, draft)


def _announce(line: str) -> None:
    print(line, flush=True)


def _load(kind: NodeKind, config: Config) -> tuple[Runner, Layout, Runner | None]:
    """The model, what its KV looks like, and the model that guesses for it, if there is one."""
    # Idle OpenMP threads must sleep, not spin: nodes of one machine share its cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from baton.kv_layout import Layout
    from baton.model.catalog import locate
    from baton.model.spec import load_spec
    from engine.memory import KvMemory
    from engine.runner import Runner

    def load(model: str, kv: KvMemory) -> Runner:
        folder = locate(model, lambda line: log.info("model", progress=line))
        return Runner.load(
            folder,
            load_spec(folder),
            config.dtype,
            config.device,
            config.block_size,
            kv,
            config.stored_kv_dtype,
            config.quantize,
        )

    torch.set_num_threads(config.threads)
    memory = KvMemory(
        config.kv_memory_mib << 20, config.memory_reserve_mib << 20, config.memory_share
    )
    runner = load(config.model, memory)
    spec = runner.spec
    layout = Layout(
        spec.fingerprint, config.stored_kv_dtype, spec.layers, spec.kv_heads, spec.head_dim
    )
    draft = None
    if kind == "decode" and config.draft_model:
        if not config.guesses:
            raise ConfigError("--draft-model guesses nothing without --guesses; give both")
        draft = load(config.draft_model, KvMemory(blocks=runner.cache.blocks))
    return runner, layout, draft


def _stop_on_signals(stop: asyncio.Event) -> None:
    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)


def _stop_on_end_of_stdin(stop: asyncio.Event) -> None:
    """Stop when whoever holds the other end of our stdin is gone, however it went."""
    loop = asyncio.get_running_loop()
    descriptor = sys.stdin.fileno()

    def on_readable() -> None:
        if not os.read(descriptor, 4096):
            loop.remove_reader(descriptor)
            stop.set()

    loop.add_reader(descriptor, on_readable)
