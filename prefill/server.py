"""The prefill node's shell: commands in, chunks through one engine thread, KV and events out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc.aio
import structlog

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
from prefill import scheduler as sched
from prefill.scheduler import LegState, PrefillScheduler
from protos import common_pb2, node_pb2, node_pb2_grpc, registry_pb2

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What the scheduler need not know of a leg."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    decode_address: str
    deadline: float


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
            config.chunk_tokens,
            config.max_waiting,
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
            counters=self._counters | self._runner.meter.counters,
        )

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
        self._perform(self._scheduler.handle(sched.Arrive(ticket, len(token_ids), stop, deadline)))

    def _cancel(self, ticket: Ticket, error: BatonError) -> None:
        self._perform(self._scheduler.handle(sched.Cancel(ticket, error)))

    def _hand_off_ended(self, ticket: Ticket, error: BatonError | None) -> None:
        self._counters["transfers_committed" if error is None else "transfers_failed"] += 1
        self._perform(self._scheduler.handle(sched.HandOffEnded(ticket, error)))

    # --- performing ---

    def _perform(self, actions: list[sched.Action]) -> None:
        for action in actions:
            ticket = action.ticket
            match action:
                case sched.BeginHandOff(block_table=block_table):
                    prompt = self._prompts[ticket]
                    self._outgoing.begin(
                        ticket,
                        prompt.decode_address,
                        len(prompt.token_ids),
                        block_table,
                        prompt.deadline,
                    )
                case sched.EndHandOff(first_token_id=first_token_id):
                    self._outgoing.computed(ticket, first_token_id)
                case sched.CancelHandOff(error=error):
                    self._outgoing.cancel(ticket, error)
                case sched.Token(token_id=token_id):
                    self._legs.token(ticket, 0, token_id)
                case sched.Finish(reason=reason):
                    self._legs.finished(ticket, reason)
                case sched.Fail(error=error):
                    log.warning("leg failed", request_id=ticket.request_id, why=error.message)
                    self._legs.failed(ticket, error)
                case sched.Released():
                    del self._prompts[ticket]
                    self._legs.released(ticket)
        self._work.set()

    async def _compute(self) -> None:
        """Run one chunk after another while there are any."""
        while True:
            plan = self._scheduler.next_step()
            if plan is None:
                self._work.clear()
                await self._work.wait()
                continue
            if plan.start == 0:
                self._legs.started(plan.ticket)
            event: sched.Event
            try:
                token_id = await self._loop.run_in_executor(self._engine, self._run, plan)
                event = sched.ChunkDone(plan.ticket, token_id)
            except Exception as error:
                log.exception("step failed", request_id=plan.ticket.request_id)
                event = sched.StepFailed(plan.ticket, EngineFailed(f"the step failed: {error}"))
            self._counters["prompt_tokens"] += plan.stop - plan.start
            self._perform(self._scheduler.handle(event))

    def _run(self, plan: sched.ChunkPlan) -> int | None:
        """On the engine's thread: compute a chunk, naming each layer's KV once it is there."""
        prompt = self._prompts[plan.ticket]

        def on_layer(layer: int) -> None:
            unit = Unit(layer, plan.start, plan.stop)
            self._loop.call_soon_threadsafe(self._outgoing.unit_ready, plan.ticket, unit)

        token_ids = prompt.token_ids[plan.start : plan.stop]
        chunk = Segment(token_ids, plan.start, plan.block_table, int(plan.last), prompt.sampling)
        [chosen] = self._runner.step([chunk], on_layer, Kind.PREFILL)
        return chosen[0] if plan.last else None


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
