"""The router as a process: who may call, what it shows, when it serves, how it stops."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from baton.client import AsyncClient, Completion, Options, RequestFailed
from baton.config import Config
from baton.errors import BatonError, Code, ConfigError
from baton.kv_layout import Layout
from protos import registry_pb2, registry_pb2_grpc
from router.life_events import Leg
from router.server import run_router
from tests.router.fake_nodes import (
    FakeCluster,
    FakeNode,
    decode_script,
    fake_cluster,
    prefill_script,
    run_async,
    running_router,
)
from tests.router.samples import LAYOUT, SPEC, LettersCodec

TOKEN = "a-token-of-this-cluster"


async def until_health(cluster: FakeCluster, wanted: int) -> None:
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="baton.v1.Inference")
        )
        async for answer in watch:
            if answer.status == wanted:
                return


async def ask(client: AsyncClient) -> Completion:
    *_, last = [update async for update in client.generate("hi", Options())]
    assert isinstance(last, Completion)
    return last


def test_the_router_never_imports_torch() -> None:
    code = "import sys, router.server; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert found.stdout.strip() == "False"


def test_health_follows_the_nodes() -> None:
    async def check() -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        async with running_router() as router:
            await until_health(router, not_serving)
            await router.join(FakeNode(Leg.PREFILL, 11, None, LAYOUT))
            await router.join(FakeNode(Leg.DECODE, 22, None, LAYOUT))
            await until_health(router, serving)
            await router.decode.stop()
            await until_health(router, not_serving)
            # A node that comes back under its old name is a new node.
            await router.join(FakeNode(Leg.DECODE, 33, None, LAYOUT))
            await until_health(router, serving)

    run_async(check())


def test_nodes_that_cannot_be_paired_do_not_make_it_serve() -> None:
    async def check() -> None:
        async with fake_cluster("x", decode_layout=replace(LAYOUT, dtype="bfloat16")) as cluster:
            refusal = ""
            while "--dtype" not in refusal:  # the streams to the nodes come up meanwhile
                with pytest.raises(BatonError) as raised:
                    await ask(cluster.client)
                assert raised.value.code is Code.UNAVAILABLE
                refusal = raised.value.message

    run_async(check())


def test_the_registry_refuses_another_model_and_does_not_know_strangers() -> None:
    async def check() -> None:
        async with (
            running_router() as router,
            grpc.aio.insecure_channel(router.grpc_address) as channel,
        ):
            stub = registry_pb2_grpc.RegistryStub(channel)
            other = Layout("f2", "float32", 2, 2, 8)
            info = FakeNode(Leg.PREFILL, 11, None, other).info()
            info.address = "127.0.0.1:1"
            with pytest.raises(grpc.aio.AioRpcError, match="same --model"):
                await stub.Register(registry_pb2.RegisterRequest(node=info))
            beat = await stub.Heartbeat(registry_pb2.HeartbeatRequest(node_id="x", epoch=1))
            assert not beat.known

    run_async(check())


def test_a_node_that_is_silent_for_its_lease_is_gone() -> None:
    async def check() -> None:
        async with fake_cluster("x", lease_s=0.6, heartbeat_s=0.1) as cluster:
            await until_health(cluster, health_pb2.HealthCheckResponse.NOT_SERVING)

    run_async(check())


def test_without_the_token_only_health_answers(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)

    async def check() -> None:
        async with fake_cluster("hello", token=TOKEN, token_file=str(file)) as cluster:
            assert (await ask(cluster.client)).completion_tokens == 5
            assert cluster.prefill.metadata["authorization"] == f"Bearer {TOKEN}"
            async with AsyncClient(cluster.grpc_address, "a-wrong-token-of-another") as stranger:
                await stranger.wait_ready(5.0)
                with pytest.raises(BatonError) as raised:
                    await ask(stranger)
                assert raised.value.code is Code.UNAUTHENTICATED
            async with httpx.AsyncClient(base_url=cluster.http_url, trust_env=False) as client:
                for headers in ({}, {"authorization": "Bearer wrong"}):
                    reply = await client.get("/v1/models", headers=headers)
                    assert reply.status_code == 401
                headers = {"authorization": f"Bearer {TOKEN}"}
                assert (await client.get("/v1/models", headers=headers)).status_code == 200
                assert (await client.get("/health")).status_code == 200

    run_async(check())


def _call_by_reflection(address: str) -> str:
    """A stranger's call: everything it knows comes from the reflection service."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = list(database.get_services())
        assert {"baton.v1.Inference", "baton.v1.Registry"} <= set(services)
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName("baton.v1.Inference").FindMethodByName("Generate")
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_stream(
            "/baton.v1.Inference/Generate",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        return "".join(answer.chunk.text for answer in call(request_class(text="hi"), timeout=5))


def test_a_client_that_knows_no_proto_can_call_by_reflection() -> None:
    async def check() -> None:
        async with fake_cluster("hello") as cluster:
            assert await asyncio.to_thread(_call_by_reflection, cluster.grpc_address) == "hello"

    run_async(check())


def test_a_stop_lets_running_requests_end_and_takes_no_new_ones() -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster:
            running = asyncio.create_task(ask(cluster.client))
            start = await cluster.prefill.starts.get()
            cluster.stop.set()
            await until_health(cluster, health_pb2.HealthCheckResponse.NOT_SERVING)
            with pytest.raises(BatonError, match="stopping") as raised:
                await ask(cluster.client)
            assert raised.value.code is Code.UNAVAILABLE
            prefill_script(ord("a"))(cluster.prefill, start.ticket)
            decode_script([ord("b")])(cluster.decode, start.ticket)
            assert (await running).completion_tokens == 2
            await cluster.task

    run_async(check())


def test_what_does_not_end_within_the_drain_is_ended_as_unavailable() -> None:
    async def check() -> None:
        async with fake_cluster(None, drain_timeout_s=0.1) as cluster:
            running = asyncio.create_task(ask(cluster.client))
            await cluster.prefill.starts.get()
            cluster.stop.set()
            with pytest.raises(RequestFailed) as raised:
                await running
            assert raised.value.code is Code.UNAVAILABLE
            await cluster.task

    run_async(check())


@pytest.mark.parametrize("door", ["listen", "http"])
def test_a_taken_port_is_a_configuration_error(door: str) -> None:
    async def check() -> None:
        async with running_router() as router:
            taken = router.grpc_address
            codec, stop = LettersCodec(), asyncio.Event()
            config = Config(**{door: taken})
            with pytest.raises(ConfigError, match="cannot listen"):
                await run_router(config, SPEC, codec, print, stop)  # type: ignore[arg-type]

    run_async(check())
