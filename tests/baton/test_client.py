"""The public client against a real router with scripted nodes."""

from __future__ import annotations

import asyncio

import pytest

from baton.client import AsyncClient, Chunk, Client, Completion, Options, RequestFailed
from baton.errors import BatonError, Code, DeadlineExceeded
from tests.router.fake_nodes import fake_cluster, run_async, running_router


def test_the_asynchronous_client_streams_and_closes_early() -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster:
            updates = cluster.client.generate("hi", Options(request_id="r1"))
            first = asyncio.create_task(anext(updates))
            start = await cluster.prefill.starts.get()
            cluster.prefill.send_tokens(start.ticket, 0, [65, 66])
            cluster_update = await first
            assert cluster_update == Chunk(0, (65, 66), "A")
            await updates.aclose()
            assert (await cluster.decode.cancels.get()).ticket.request_id == "r1"

    run_async(check())


def test_the_synchronous_client_answers_with_a_timing_record() -> None:
    async def check() -> None:
        async with fake_cluster("hello") as cluster:
            updates = await asyncio.to_thread(_ask_in_a_thread, cluster.grpc_address)
            *chunks, completion = updates
            assert "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk)) == "hello"
            assert isinstance(completion, Completion)
            assert completion.timing["finished"] > 0
            assert completion.seed == 9

    run_async(check())


def _ask_in_a_thread(address: str) -> list[Chunk | Completion]:
    with Client(address) as client:
        client.wait_ready(5.0)
        info = client.model_info()
        assert (info.name, info.eos_token_ids) == ("letters", (0,))
        with pytest.raises(RequestFailed, match="empty"):
            list(client.generate([]))
        return list(client.generate([("user", "hi")], Options(seed=9, timeout_s=5.0)))


def test_model_info_says_what_is_served() -> None:
    async def check() -> None:
        async with running_router() as router:
            info = await router.client.model_info()
            assert (info.context_length, info.vocabulary_size) == (64, 256)
            assert info.has_chat_template

    run_async(check())


def test_waiting_for_a_router_has_a_deadline() -> None:
    async def check() -> None:
        async with running_router() as router:
            with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
                await router.client.wait_ready(0.2)
        async with AsyncClient("127.0.0.1:1") as client:
            with pytest.raises(BatonError) as raised:
                await client.model_info()
            assert raised.value.code is Code.UNAVAILABLE

    run_async(check())
