"""The prefill node's shell: commands in, chunks through one engine thread, KV and events out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc.aio
import structlog

from baton import leg_events as leg
from baton.cache_events import CacheNews
from baton.config import Config
from baton.errors import BatonError, EngineFailed
from baton.ids import Ticket
from baton.kv_layout import Layout
from baton.legs import Legs
from baton.node import Identity, run_node
from baton.sampling import SamplingParams
from baton.wire import layout_to_proto, sampling_from_proto
from engine.accounting import Kind
from engine.block_pool import BlockPool
from engine.runner import Runner
from engine.segments import Segment
from kvtransfer.layout import Unit
from kvtransfer.link import LinkSettings
from kvtransfer.outgoing import Outgoing
from prefill import events as ev
from prefill.scheduler import LegState, Limits, PrefillScheduler
from protos import common_pb2, node_pb2, node_pb2_grpc, registry_pb2

log = structlog.get_logger()


@dataclass(slots=True)
class _Prompt:
    """What the scheduler need not know of a leg."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    decode_address: str
    deadline: float
    cached_tokens: int = 0


class PrefillNode(node_pb2_grpc.PrefillServicer):
    """Receives, asks the scheduler, performs. All state is touched on the event loop only."""

    def __init__(self, config: Config, runner: Runner, layout: Layout) -> None:
        self.identity = Identity(config, common_pb2.ROLE_PREFILL)
        self._config = config
        self._runner = runner
        self._layout = layout
        self._pool = BlockPool(runner.cache.blocks)
        self._scheduler = PrefillScheduler(
            self._pool,
            config.block_size,
            Limits(config.step_tokens, config.max_waiting, config.age_limit_s),
            runner.spec.eos_token_ids,
        )
        settings = LinkSettings(
            self.identity.node_id,
            self.identity.epoch,
            layout,
            config.block_size,
            self.identity.link_host,
            config,
        )
        self._outgoing = Outgoing(settings, runner.cache, self._hand_off_ended)
        self._legs = Legs(self._start, self._cancel)
        self._prompts: dict[Ticket, _Prompt] = {}
        self._counters: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._work = asyncio.Event()
        self._computing = asyncio.create_task(self._compute())

    # --- what the shell around the node asks for ---

    def add_services(self, server: grpc.aio.Server) -> list[str]:
        node_pb2_grpc.add_PrefillServicer_to_server(self, server)
        return ["baton.v1.Prefill"]

    def info(self) -> registry_pb2.NodeInfo:
        return registry_pb2.NodeInfo(
            node_id=self.identity.node_id,
            role=self.identity.role,
            epoch=self.identity.epoch,
            layout=layout_to_proto(self._layout, self._config.block_size),
            blocks_total=self._pool.total,
            max_running=1,
        )

    def status(self) -> node_pb2.NodeStatus:
        return node_pb2.NodeStatus(
            node_id=self.identity.node_id,
            role=self.identity.role,
            epoch=self.identity.epoch,
            blocks_total=self._pool.total,
            blocks_free=self._pool.free,
            requests_waiting=self._scheduler.count(LegState.WAITING),
            requests_running=self._scheduler.count(LegState.COMPUTING, LegState.HANDING_OFF),
            transfers_in_flight=self._outgoing.in_flight,
            links_open=self._outgoing.links_open,
            router_streams=self._legs.streams_open,
            counters=self._counters
            | self._runner.meter.counters
            | {
                "prefix_cache_queries": self._scheduler.cache_queries,
                "prefix_cache_hits": self._scheduler.cache_hits,
            },
            blocks_cached=self._pool.cached,
        )

    def cache_news(self, number: int | None) -> CacheNews:
        return self._pool.news(number)

    def tick(self, now: float) -> None:
        self._perform(self._scheduler.tick(now))
        self._outgoing.tick(now)

    def cancel_all(self, error: BatonError) -> None:
        for ticket in self._scheduler.tickets():
            self._cancel(ticket, error)

    @property
    def idle(self) -> asyncio.Event:
        return self._legs.idle

    async def warm_up(self) -> None:
        """One real step, so that the first request does not pay for what is made lazily."""
        await self._loop.run_in_executor(self._engine, self._runner.warm_up)

    async def close(self) -> None:
        await self._outgoing.close()
        self._computing.cancel()
        await self._loop.run_in_executor(None, self._engine.shutdown)

    # --- the router's stream ---

    async def Run(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        await self._legs.serve(context)

    def _start(self, ticket: Ticket, command: node_pb2.PrefillStart) -> None:
        sampling, stop = sampling_from_proto(command.sampling)
        deadline = self._loop.time() + command.deadline_s
        token_ids = tuple(command.prompt_token_ids)
        self._prompts[ticket] = _Prompt(token_ids, sampling, command.decode_address, deadline)
        self._counters["requests"] += 1
        due = self._loop.time() + command.due_s
        self._handle(ev.Arrive(ticket, token_ids, stop, due, deadline, command.cache_salt))

    def _cancel(self, ticket: Ticket, error: BatonError) -> None:
        self._handle(leg.Cancel(ticket, error))

    def _hand_off_ended(self, ticket: Ticket, error: BatonError | None) -> None:
        self._counters["transfers_committed" if error is None else "transfers_failed"] += 1
        self._handle(ev.HandOffEnded(ticket, error))

    # --- performing ---

    def _handle(self, event: ev.Event) -> None:
        self._perform(self._scheduler.handle(event, self._loop.time()))

    def _perform(self, actions: list[ev.Action]) -> None:
        for action in actions:
            ticket = action.ticket
            match action:
                case ev.BeginHandOff(block_table=block_table, cached_tokens=cached_tokens):
                    prompt = self._prompts[ticket]
                    self._outgoing.begin(
                        ticket,
                        prompt.decode_address,
                        len(prompt.token_ids),
                        block_table,
                        prompt.deadline,
                    )
                    prompt.cached_tokens = cached_tokens
                    self._announce_cached(ticket, cached_tokens)
                case ev.EndHandOff(first_token_id=first_token_id):
                    self._outgoing.computed(ticket, first_token_id)
                case leg.CancelHandOff(error=error):
                    self._outgoing.cancel(ticket, error)
                case ev.Token(token_id=token_id):
                    self._legs.token(ticket, 0, token_id)
                case leg.Finish(reason=reason):
                    self._legs.finished(ticket, reason)
                case leg.Fail(error=error):
                    log.warning("leg failed", request_id=ticket.request_id, why=error.message)
                    self._legs.failed(ticket, error)
                case leg.Released():
                    del self._prompts[ticket]
                    self._legs.released(ticket)
        self._work.set()

    def _announce_cached(self, ticket: Ticket, tokens: int) -> None:
        """Name what the prefix cache had of a prompt, in units no longer than computed ones."""
        most = self._config.step_tokens
        for layer in range(self._layout.layers):
            for start in range(0, tokens, most):
                unit = Unit(layer, start, min(start + most, tokens))
                self._outgoing.unit_ready(ticket, unit)

    async def _compute(self) -> None:
        """Run one step after another while there are any chunks."""
        while True:
            chunks = self._scheduler.next_step(self._loop.time())
            if not chunks:
                self._work.clear()
                await self._work.wait()
                continue
            for chunk in chunks:
                if chunk.first:
                    cached_tokens = self._prompts[chunk.ticket].cached_tokens
                    self._legs.started(chunk.ticket, cached_tokens)
            event: ev.Event
            begun = self._loop.time()
            try:
                token_ids = await self._loop.run_in_executor(self._engine, self._run, chunks)
                event = ev.StepDone(token_ids, self._loop.time() - begun)
            except Exception as error:
                log.exception("step failed", request_ids=[c.ticket.request_id for c in chunks])
                event = leg.StepFailed(EngineFailed(f"the step failed: {error}"))
            self._counters["prompt_tokens"] += sum(c.stop - c.start for c in chunks)
            self._handle(event)

    def _run(self, chunks: list[ev.Chunk]) -> dict[Ticket, int]:
        """On the engine's thread: compute a step, naming each layer's KV once it is there.

        Returns the first token of each prompt that ends.
        """

        def name_units(layer: int) -> None:
            for chunk in chunks:
                self._outgoing.unit_ready(chunk.ticket, Unit(layer, chunk.start, chunk.stop))

        def on_layer(layer: int) -> None:
            self._loop.call_soon_threadsafe(name_units, layer)

        segments = []
        for chunk in chunks:
            prompt = self._prompts[chunk.ticket]
            token_ids = prompt.token_ids[chunk.start : chunk.stop]
            choices = 1 if chunk.last else 0
            segments.append(
                Segment(token_ids, chunk.start, chunk.block_table, choices, prompt.sampling)
            )
        chosen = self._runner.step(segments, on_layer, Kind.PREFILL)
        return {
            chunk.ticket: token_ids[0]
            for chunk, token_ids in zip(chunks, chosen, strict=True)
            if token_ids
        }


async def serve(
    config: Config,
    runner: Runner,
    layout: Layout,
    announce: Callable[[str], None],
    stop: asyncio.Event,
) -> None:
    """Run a prefill node over a loaded model until `stop` is set."""
    node = PrefillNode(config, runner, layout)
    await run_node(config, node, node.warm_up, announce, stop)
