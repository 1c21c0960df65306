"""The router's stream to a node: events leave together, and legs end with the stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from baton import legs as legs_module
from baton.errors import BatonError, Overloaded
from baton.ids import Ticket
from baton.legs import Legs
from baton.sampling import FinishReason
from baton.wire import ticket_to_proto
from protos import common_pb2, node_pb2

A, B = Ticket("a", 0, 1, 2), Ticket("b", 0, 1, 2)


class Router:
    """The other end of one `Run` call, in place of gRPC's context."""

    def __init__(self, reads: bool = True) -> None:
        self.commands: asyncio.Queue[Any] = asyncio.Queue()
        self.messages: asyncio.Queue[list[node_pb2.LegEvent]] = asyncio.Queue()
        self.reads = reads

    async def read(self) -> Any:
        return await self.commands.get()

    async def write(self, message: node_pb2.LegEvents) -> None:
        self.messages.put_nowait(list(message.events))
        if not self.reads:
            await asyncio.Event().wait()  # as gRPC's flow control does

    def start(self, ticket: Ticket) -> None:
        start = node_pb2.PrefillStart(ticket=ticket_to_proto(ticket), deadline_s=9)
        self.commands.put_nowait(node_pb2.PrefillCommand(start=start))

    def cancel(self, ticket: Ticket, reason: str = "") -> None:
        cancel = node_pb2.CancelLeg(ticket=ticket_to_proto(ticket), reason=reason)
        self.commands.put_nowait(node_pb2.PrefillCommand(cancel=cancel))

    def hang_up(self) -> None:
        self.commands.put_nowait(grpc.aio.EOF)


class Node:
    """Legs, and what they told the node."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[tuple[str, Ticket]] = asyncio.Queue()
        self.reasons: list[BatonError] = []
        self.legs = Legs(self._start, self._cancel)

    def _start(self, ticket: Ticket, body: node_pb2.PrefillStart) -> None:
        assert body.deadline_s == 9
        self.told.put_nowait(("start", ticket))

    def _cancel(self, ticket: Ticket, error: BatonError) -> None:
        self.reasons.append(error)
        self.told.put_nowait(("cancel", ticket))


Story = Callable[[Node, Router], Awaitable[None]]


def play(story: Story, *, reads: bool = True) -> None:
    """Run a story on one open stream; the stream's call ends with it."""

    async def scene() -> None:
        node, router = Node(), Router(reads)
        call = asyncio.create_task(node.legs.serve(router))
        async with asyncio.timeout(20):
            try:
                await story(node, router)
            finally:
                router.hang_up()
                await call

    asyncio.run(scene())


def test_a_start_reaches_the_node_once_however_often_it_is_sent() -> None:
    async def story(node: Node, router: Router) -> None:
        router.start(A)
        router.start(A)
        router.start(B)
        assert [await node.told.get() for _ in range(2)] == [("start", A), ("start", B)]

    play(story)


def test_events_of_one_turn_leave_in_one_message() -> None:
    async def story(node: Node, router: Router) -> None:
        router.start(A)
        router.start(B)
        for _ in range(2):
            await node.told.get()
        node.legs.token(A, 1, 50)
        node.legs.token(B, 7, 51)
        node.legs.finished(B, FinishReason.LENGTH)
        events = await router.messages.get()
        assert [event.ticket.request_id for event in events] == ["a", "b", "b"]
        assert (events[1].tokens.index, list(events[1].tokens.token_ids)) == (7, [51])
        assert events[2].finished.reason == common_pb2.FINISH_REASON_LENGTH
        assert router.messages.empty()

    play(story)


def test_every_event_arrives_in_the_order_it_was_reported() -> None:
    async def story(node: Node, router: Router) -> None:
        router.start(A)
        await node.told.get()
        node.legs.started(A, 16)
        node.legs.transferred(A, 4096)
        node.legs.failed(A, Overloaded("no room"))
        node.legs.released(A)
        events = await router.messages.get()
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds == ["started", "transferred", "failed", "released"]
        assert events[1].transferred.kv_bytes == 4096
        failed = events[2].failed
        assert (failed.code, failed.message) == ("RESOURCE_EXHAUSTED", "no room")

    play(story)


def test_a_cancellation_carries_the_routers_reason() -> None:
    async def story(node: Node, router: Router) -> None:
        router.cancel(A, "the client left")
        router.cancel(B)
        for ticket in (A, B):
            assert await node.told.get() == ("cancel", ticket)
        messages = [error.message for error in node.reasons]
        assert messages == ["the client left", "the router cancelled this leg"]

    play(story)


def test_the_end_of_a_stream_cancels_its_legs_and_no_others() -> None:
    async def story(node: Node, router: Router) -> None:
        other = Router()
        call = asyncio.create_task(node.legs.serve(other))
        router.start(A)
        other.start(B)
        for _ in range(2):
            await node.told.get()
        assert node.legs.streams_open == 2
        other.hang_up()
        await call
        assert await node.told.get() == ("cancel", B)
        assert node.told.empty()
        assert node.legs.streams_open == 1

    play(story)


def test_a_call_that_is_cancelled_cancels_its_legs() -> None:
    """As gRPC does when the router's connection breaks."""

    async def story(node: Node, _: Router) -> None:
        broken = Router()
        call = asyncio.create_task(node.legs.serve(broken))
        broken.start(A)
        await node.told.get()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await node.told.get() == ("cancel", A)

    play(story)


def test_a_leg_of_an_ended_stream_may_still_report_and_is_forgotten_once_released() -> None:
    async def story(node: Node, _: Router) -> None:
        ended = Router()
        call = asyncio.create_task(node.legs.serve(ended))
        ended.start(A)
        await node.told.get()
        ended.hang_up()
        await call
        node.legs.token(A, 1, 50)
        assert not node.legs.idle.is_set()
        node.legs.released(A)
        assert node.legs.idle.is_set()

    play(story)


def test_a_node_is_idle_while_it_has_no_leg() -> None:
    async def story(node: Node, router: Router) -> None:
        assert node.legs.idle.is_set()
        router.start(A)
        router.start(B)
        for _ in range(2):
            await node.told.get()
        node.legs.released(A)
        assert not node.legs.idle.is_set()
        node.legs.released(B)
        assert node.legs.idle.is_set()

    play(story)


def test_a_ticket_may_come_again_once_it_was_released() -> None:
    async def story(node: Node, router: Router) -> None:
        for _ in range(2):
            router.start(A)
            assert await node.told.get() == ("start", A)
            node.legs.released(A)

    play(story)


def test_a_router_that_does_not_read_loses_its_stream_and_legs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even while gRPC's flow control holds a write up: events in memory have a limit (P8)."""
    monkeypatch.setattr(legs_module, "MAX_EVENTS_WAITING", 3)

    async def story(node: Node, _: Router) -> None:
        deaf = Router(reads=False)
        call = asyncio.create_task(node.legs.serve(deaf))
        deaf.start(A)
        await node.told.get()
        node.legs.token(A, 1, 50)
        assert len(await deaf.messages.get()) == 1  # its write never returns
        for index in range(2, 6):
            node.legs.token(A, index, 50)
        await call
        assert await node.told.get() == ("cancel", A)

    play(story)


def test_a_stream_that_breaks_cancels_its_legs_and_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Broken(Router):
        async def read(self) -> Any:
            command = await super().read()
            if isinstance(command, Exception):
                raise command
            return command

    async def story(node: Node, _: Router) -> None:
        broken = Broken()
        call = asyncio.create_task(node.legs.serve(broken))
        broken.start(A)
        await node.told.get()
        broken.commands.put_nowait(OSError("the wire was cut"))
        await call
        assert await node.told.get() == ("cancel", A)

    play(story)
    printed = capsys.readouterr()
    assert "the wire was cut" in printed.out + printed.err


def test_an_unknown_command_is_passed_over() -> None:
    async def story(node: Node, router: Router) -> None:
        router.commands.put_nowait(node_pb2.PrefillCommand())
        router.start(A)
        assert await node.told.get() == ("start", A)

    play(story)
