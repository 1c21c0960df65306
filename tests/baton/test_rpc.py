"""What every gRPC server of Baton does: the token's guard, health, reflection, its one address."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.config import Config, split_address
from baton.errors import Code, ConfigError, Overloaded
from baton.rpc import (
    NOT_SERVING,
    SERVING,
    Server,
    abort_with,
    auth_metadata,
    error_from_rpc,
    open_channel,
    status_code,
)
from protos import node_pb2, node_pb2_grpc

NODE = "baton.v1.Node"
TOKEN = "a-secret-of-some-length"
MAX_BYTES = 64 << 10


class NodeService(node_pb2_grpc.NodeServicer):
    """Answers with a status, or with the error it was given."""

    def __init__(self, error: Overloaded | None = None) -> None:
        self._error = error

    async def GetStatus(
        self, request: node_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> node_pb2.NodeStatus:
        if self._error is not None:
            await abort_with(context, self._error)
        return node_pb2.NodeStatus(node_id="n1")


Story = Callable[[Server, grpc.aio.Channel], Awaitable[None]]


@asynccontextmanager
async def serving(
    config: Config, service: NodeService
) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
    server = Server(config)
    node_pb2_grpc.add_NodeServicer_to_server(service, server.grpc)
    address = await server.start([NODE])
    try:
        async with open_channel(address, config.max_message_bytes) as channel:
            yield server, channel
    finally:
        await server.stop(0)


def play(story: Story, config: Config | None = None, service: NodeService | None = None) -> None:
    async def scene() -> None:
        async with (
            asyncio.timeout(20),
            serving(config or Config(), service or NodeService()) as (server, channel),
        ):
            await story(server, channel)

    asyncio.run(scene())


@pytest.fixture
def guarded(tmp_path: Path) -> Config:
    (tmp_path / "token").write_text(TOKEN)
    return Config(token_file=str(tmp_path / "token"))


async def health_of(channel: grpc.aio.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    status: int = answer.status
    return status


async def node_id(channel: grpc.aio.Channel, token: str | None = None) -> str:
    stub = node_pb2_grpc.NodeStub(channel)
    answer = await stub.GetStatus(node_pb2.GetStatusRequest(), metadata=auth_metadata(token))
    name: str = answer.node_id
    return name


async def services_shown(channel: grpc.aio.Channel, token: str | None = None) -> set[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([request]), metadata=auth_metadata(token))
    answer = await call.read()
    call.cancel()
    return {service.name for service in answer.list_services_response.service}


def test_without_a_token_everybody_on_loopback_may_call() -> None:
    async def story(_: Server, channel: grpc.aio.Channel) -> None:
        assert await node_id(channel) == "n1"

    play(story)


@pytest.mark.parametrize("shown", [None, "another-secret-of-that", TOKEN[:-1], TOKEN + "x"])
def test_a_call_without_the_token_is_refused(guarded: Config, shown: str | None) -> None:
    async def story(_: Server, channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await node_id(channel, shown)
        assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "Bearer TOKEN" in (refusal.value.details() or "")
        assert TOKEN not in str(refusal.value)

    play(story, guarded)


def test_a_streaming_call_without_the_token_is_refused(guarded: Config) -> None:
    async def story(_: Server, channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await services_shown(channel)
        assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED

    play(story, guarded)


def test_a_call_with_the_token_goes_through(guarded: Config) -> None:
    async def story(_: Server, channel: grpc.aio.Channel) -> None:
        assert await node_id(channel, TOKEN) == "n1"

    play(story, guarded)


def test_health_needs_no_token(guarded: Config) -> None:
    """Load balancers and container probes have none."""

    async def story(_: Server, channel: grpc.aio.Channel) -> None:
        assert await health_of(channel, NODE) == NOT_SERVING

    play(story, guarded)


@pytest.mark.parametrize("service", ["", NODE])
def test_health_says_when_a_node_can_serve(service: str) -> None:
    async def story(server: Server, channel: grpc.aio.Channel) -> None:
        assert await health_of(channel, service) == NOT_SERVING
        await server.set_serving(True)
        assert await health_of(channel, service) == SERVING
        await server.set_serving(False)
        assert await health_of(channel, service) == NOT_SERVING

    play(story)


def test_reflection_shows_the_services() -> None:
    async def story(_: Server, channel: grpc.aio.Channel) -> None:
        assert await services_shown(channel) == {
            NODE,
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }

    play(story)


def test_a_taken_port_is_refused_by_name() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        async def scene() -> None:
            server = Server(Config(listen=f"127.0.0.1:{port}"))
            try:
                with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
                    await server.start([])
            finally:
                await server.stop(0)

        asyncio.run(scene())


def test_two_servers_do_not_share_a_port() -> None:
    """Linux would let them, and give each a part of the calls."""

    async def scene() -> None:
        async with asyncio.timeout(20):
            first = Server(Config())
            second = Server(Config(listen=await first.start([])))
            try:
                with pytest.raises(ConfigError, match="is the port taken"):
                    await second.start([])
            finally:
                await second.stop(0)
                await first.stop(0)

    asyncio.run(scene())


def test_port_zero_becomes_the_port_that_was_bound() -> None:
    async def scene() -> None:
        async with asyncio.timeout(20):
            server = Server(Config())
            host, port = split_address(await server.start([]))
            await server.stop(0)
        assert host == "127.0.0.1"
        assert port > 0

    asyncio.run(scene())


async def send_too_much(channel: grpc.aio.Channel) -> None:
    call = channel.unary_unary(f"/{NODE}/GetStatus")
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await call(bytes(MAX_BYTES + 1))
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_server_refuses_a_message_over_the_limit() -> None:
    """Whatever the limits of who sends it."""

    async def scene() -> None:
        async with asyncio.timeout(20):
            server = Server(Config(max_message_bytes=MAX_BYTES))
            node_pb2_grpc.add_NodeServicer_to_server(NodeService(), server.grpc)
            address = await server.start([NODE])
            async with grpc.aio.insecure_channel(address) as channel:
                await send_too_much(channel)
            await server.stop(0)

    asyncio.run(scene())


def test_a_channel_sends_no_message_over_the_limit() -> None:
    """Whatever the limits of who receives it."""

    async def scene() -> None:
        async with asyncio.timeout(20):
            server = grpc.aio.server()
            node_pb2_grpc.add_NodeServicer_to_server(NodeService(), server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            async with open_channel(f"127.0.0.1:{port}", MAX_BYTES) as channel:
                await send_too_much(channel)
            await server.stop(0)

    asyncio.run(scene())


def test_an_error_reaches_the_caller_with_its_code_and_sentence() -> None:
    async def story(_: Server, channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await node_id(channel)
        error = error_from_rpc(failure.value)
        assert (error.code, error.message) == (Code.RESOURCE_EXHAUSTED, "no room; try later")

    play(story, service=NodeService(Overloaded("no room; try later")))


@pytest.mark.parametrize("code", Code)
def test_every_code_of_ours_is_one_of_grpc(code: Code) -> None:
    assert status_code(code).name == code


@pytest.mark.parametrize(("token", "shown"), [(None, ()), ("", ()), ("t", ("Bearer t",))])
def test_a_token_is_shown_only_where_there_is_one(
    token: str | None, shown: tuple[str, ...]
) -> None:
    assert tuple(value for _, value in auth_metadata(token)) == shown
