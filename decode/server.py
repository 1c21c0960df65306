"""The decode node's shell: the baton and commands in, steps on one engine thread, tokens out."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc.aio
import structlog

from baton import leg_events as leg
from baton.cache_events import CacheNews
from baton.config import Config
from baton.errors import BatonError, EngineFailed, LinkLost
from baton.ids import Ticket
from baton.kv_layout import Layout
from baton.legs import Legs
from baton.node import Identity, run_node
from baton.wire import layout_to_proto, sampling_from_proto
from decode import events as ev
from decode.scheduler import DecodeScheduler, LegState, Limits
from decode.stepper import Stepper
from engine.block_pool import BlockPool
from engine.runner import Runner
from kvtransfer.incoming import Incoming
from kvtransfer.link import LinkSettings
from protos import common_pb2, kvtransfer_pb2_grpc, node_pb2, node_pb2_grpc, registry_pb2

log = structlog.get_logger()


class DecodeNode(node_pb2_grpc.DecodeServicer):
    """Receives, asks the scheduler, performs. All state is touched on the event loop only."""

    def __init__(
        self, config: Config, runner: Runner, layout: Layout, draft: Runner | None = None
    ) -> None:
        self.identity = Identity(config, common_pb2.ROLE_DECODE)
        self._config = config
        self._runner = runner
        self._stepper = Stepper(runner, draft)
        self._layout = layout
        self._pool = BlockPool(runner.cache.blocks)
        self._scheduler = DecodeScheduler(
            self._pool,
            config.block_size,
            Limits(
                config.max_running,
                config.step_tokens,
                config.max_waiting,
                math.ceil(config.watermark * self._pool.total),
            ),
            runner.spec.eos_token_ids,
            config.guesses,
        )
        settings = LinkSettings(
            self.identity.node_id,
            self.identity.epoch,
            layout,
            config.block_size,
            self.identity.link_host,
            config,
        )
        self._incoming = Incoming(settings, runner.cache, self._committed, self._hand_off_ended)
        self._legs = Legs(self._start, self._cancel)
        self._counters: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._work = asyncio.Event()
        self._computing = asyncio.create_task(self._compute())

    # --- what the shell around the node asks for ---

    def add_services(self, server: grpc.aio.Server) -> list[str]:
        node_pb2_grpc.add_DecodeServicer_to_server(self, server)
        kvtransfer_pb2_grpc.add_KvTransferServicer_to_server(self._incoming, server)
        return ["baton.v1.Decode", "baton.v1.KvTransfer"]

    def info(self) -> registry_pb2.NodeInfo:
        return registry_pb2.NodeInfo(
            node_id=self.identity.node_id,
            role=self.identity.role,
            epoch=self.identity.epoch,
            layout=layout_to_proto(self._layout, self._config.block_size),
            blocks_total=self._pool.total,
            max_running=self._config.max_running,
        )

    def status(self) -> node_pb2.NodeStatus:
        return node_pb2.NodeStatus(
            node_id=self.identity.node_id,
            role=self.identity.role,
            epoch=self.identity.epoch,
            blocks_total=self._pool.total,
            blocks_free=self._pool.free,
            requests_waiting=self._scheduler.count(LegState.WAITING),
            requests_running=self._scheduler.count(LegState.RECEIVING, LegState.RUNNING),
            transfers_in_flight=self._incoming.in_flight,
            links_open=self._incoming.links_open,
            router_streams=self._legs.streams_open,
            counters=self._counters
            | self._runner.meter.counters
            | self._stepper.counters
            | {
                "preemptions": self._scheduler.preemptions,
                "recomputed_tokens": self._scheduler.recomputed_tokens,
            },
            blocks_cached=self._pool.cached,
        )

    def cache_news(self, number: int | None) -> CacheNews:
        return self._pool.news(number)

    def tick(self, now: float) -> None:
        self._perform(self._scheduler.tick(now))
        self._incoming.tick(now)

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
        await self._incoming.close()
        self._computing.cancel()
        await self._loop.run_in_executor(None, self._engine.shutdown)

    # --- the router's stream and the hand-off ---

    async def Run(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        await self._legs.serve(context)

    def _start(self, ticket: Ticket, command: node_pb2.DecodeStart) -> None:
        sampling, stop = sampling_from_proto(command.sampling)
        deadline = self._loop.time() + command.deadline_s
        self._counters["requests"] += 1
        self._perform(
            self._scheduler.handle(
                ev.Arrive(
                    ticket,
                    tuple(command.prompt_token_ids),
                    sampling,
                    stop,
                    deadline,
                    command.cache_salt,
                )
            )
        )

    def _cancel(self, ticket: Ticket, error: BatonError) -> None:
        self._perform(self._scheduler.handle(leg.Cancel(ticket, error)))

    def _committed(self, ticket: Ticket, first_token_id: int) -> None:
        self._counters["transfers_committed"] += 1
        self._perform(self._scheduler.handle(ev.Committed(ticket, first_token_id)))

    def _hand_off_ended(self, ticket: Ticket, error: BatonError | None) -> None:
        self._counters["transfers_failed"] += 1
        reason = error or LinkLost("the hand-off ended")
        self._perform(self._scheduler.handle(ev.HandOffEnded(ticket, reason)))

    # --- performing ---

    def _perform(self, actions: list[ev.Action]) -> None:
        for action in actions:
            ticket = action.ticket
            match action:
                case ev.Reserve(_, prompt_tokens, block_table, deadline):
                    self._incoming.reserve(ticket, prompt_tokens, block_table, deadline)
                case leg.CancelHandOff(error=error):
                    self._incoming.cancel(ticket, error)
                case ev.Transferred(prompt_tokens=prompt_tokens):
                    kv_bytes = self._layout.prompt_bytes(prompt_tokens)
                    self._counters["kv_bytes_received"] += kv_bytes
                    self._legs.transferred(ticket, kv_bytes)
                case ev.Token(index=index, token_id=token_id):
                    self._counters["tokens"] += 1
                    self._legs.token(ticket, index, token_id)
                case leg.Finish(reason=reason):
                    self._legs.finished(ticket, reason)
                case leg.Fail(error=error):
                    log.warning("leg failed", request_id=ticket.request_id, why=error.message)
                    self._legs.failed(ticket, error)
                case leg.Released():
                    self._stepper.forget([ticket])
                    self._legs.released(ticket)
        self._work.set()

    async def _compute(self) -> None:
        """Run one step after another while any sequence is running."""
        while True:
            step = self._scheduler.next_step()
            self._stepper.forget(step.preempted)
            for ticket in step.preempted:
                log.info("preempted", request_id=ticket.request_id)
                self._legs.degraded(ticket, "preempted")
            if not step.rows:
                self._work.clear()
                await self._work.wait()
                continue
            event: ev.Event
            try:
                token_ids = await self._loop.run_in_executor(
                    self._engine, self._stepper.run, step.rows
                )
                event = ev.StepDone(token_ids)
            except Exception as error:
                log.exception("step failed", rows=len(step.rows))
                event = leg.StepFailed(EngineFailed(f"the step failed: {error}"))
            self._perform(self._scheduler.handle(event))


async def serve(
    config: Config,
    runner: Runner,
    layout: Layout,
    announce: Callable[[str], None],
    stop: asyncio.Event,
    draft: Runner | None = None,
) -> None:
    """Run a decode node over a loaded model until `stop` is set."""
    node = DecodeNode(config, runner, layout, draft)
    await run_node(config, node, node.warm_up, announce, stop)
