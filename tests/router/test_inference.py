"""The way of a request through a real router and back, over loopback gRPC."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest

from baton.client import AsyncClient, Chunk, Completion, Options, RequestFailed
from baton.errors import BatonError, Code
from baton.sampling import FinishReason
from protos import common_pb2, inference_pb2, inference_pb2_grpc, node_pb2
from router.life_events import Leg
from tests.router.fake_nodes import (
    FakeCluster,
    FakeNode,
    decode_script,
    fake_cluster,
    prefill_script,
    run_async,
    running_router,
)
from tests.router.samples import LAYOUT


async def ask(client: AsyncClient, prompt: Any = "hi", **options: Any) -> tuple[str, Completion]:
    """The whole answer; asserts that its token indices have no gap and no repeat (P2)."""
    token_ids: list[int] = []
    text = ""
    async for update in client.generate(prompt, Options(**options)):
        if isinstance(update, Completion):
            assert "".join(map(chr, token_ids)) == text
            return text, update
        assert update.index == len(token_ids)
        token_ids += update.token_ids
        text += update.text
    raise AssertionError("an answer ends with a Completion")


async def failure(client: AsyncClient, prompt: Any = "hi", **options: Any) -> BatonError:
    with pytest.raises(BatonError) as raised:
        await ask(client, prompt, **options)
    return raised.value


async def both_starts(cluster: FakeCluster) -> tuple[Any, Any]:
    return await cluster.prefill.starts.get(), await cluster.decode.starts.get()


def test_an_answer_streams_in_order_with_its_timing() -> None:
    async def check() -> None:
        async with fake_cluster("hello") as cluster:
            text, completion = await ask(cluster.client, "hi", seed=7)
            assert text == "hello"
            assert completion.finish_reason is FinishReason.STOP
            assert (completion.prompt_tokens, completion.completion_tokens) == (2, 5)
            assert completion.seed == 7
            timing = completion.timing
            assert timing.pop("degraded") == []
            assert set(timing) == {
                "queued",
                "placed",
                "prefill_started",
                "first_token",
                "transfer_done",
                "first_decode",
                "finished",
            }

    run_async(check())


def test_both_legs_are_sent_before_either_node_answers() -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster:
            asking = asyncio.create_task(
                ask(cluster.client, "hey", max_tokens=5, temperature=0.5, seed=3)
            )
            prefill, decode = await both_starts(cluster)
            assert prefill.ticket == decode.ticket
            assert prefill.ticket.prefill_epoch == 11
            assert prefill.ticket.decode_epoch == 22
            assert list(prefill.prompt_token_ids) == [ord(letter) for letter in "hey"]
            assert len(decode.prompt_token_ids) == 3
            assert prefill.decode_address == cluster.decode.address
            assert prefill.sampling == decode.sampling
            assert prefill.sampling.max_tokens == 5
            assert 0 < prefill.deadline_s <= 600
            decode_script([ord("b")])(cluster.decode, decode.ticket)
            prefill_script(ord("a"))(cluster.prefill, prefill.ticket)
            assert (await asking)[0] == "ab"

    run_async(check())


def test_a_first_token_that_ends_the_answer_cancels_the_decode_leg() -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster:
            asking = asyncio.create_task(ask(cluster.client))
            prefill, decode = await both_starts(cluster)
            cluster.prefill.finish(prefill.ticket, common_pb2.FINISH_REASON_STOP)
            text, completion = await asking
            assert (text, completion.completion_tokens) == ("", 0)
            assert (await cluster.decode.cancels.get()).ticket == decode.ticket

    run_async(check())


def test_a_client_that_goes_away_cancels_both_legs() -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster:
            asking = asyncio.create_task(ask(cluster.client))
            prefill, _ = await both_starts(cluster)
            cluster.prefill.send_tokens(prefill.ticket, 0, [65])
            asking.cancel()
            assert (await cluster.prefill.cancels.get()).ticket == prefill.ticket
            assert "client" in (await cluster.decode.cancels.get()).reason

    run_async(check())


def test_abort_ends_the_stream_as_cancelled_and_both_legs() -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster:
            asking = asyncio.create_task(failure(cluster.client, request_id="r1"))
            await both_starts(cluster)
            assert await cluster.client.abort("r1")
            error = await asking
            assert error.code is Code.CANCELLED
            assert "aborted" in error.message
            await cluster.prefill.cancels.get()
            await cluster.decode.cancels.get()
            assert not await cluster.client.abort("r1")

    run_async(check())


@pytest.mark.parametrize("role", list(Leg))
def test_the_death_of_a_node_ends_its_requests_as_unavailable(role: Leg) -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster:
            asking = asyncio.create_task(failure(cluster.client))
            await both_starts(cluster)
            await cluster.nodes[role].stop()
            error = await asking
            assert error.code is Code.UNAVAILABLE
            assert role in error.message
            assert isinstance(error, RequestFailed)
            assert error.timing["finished"] >= error.timing["placed"]
            other = cluster.decode if role is Leg.PREFILL else cluster.prefill
            await other.cancels.get()

    run_async(check())


def test_the_deadline_of_the_router_ends_a_request() -> None:
    async def check() -> None:
        async with fake_cluster(None, request_timeout_s=0.2) as cluster:
            error = await failure(cluster.client)
            assert error.code is Code.DEADLINE_EXCEEDED
            await cluster.prefill.cancels.get()
            await cluster.decode.cancels.get()

    run_async(check())


def test_the_deadline_of_the_client_reaches_the_nodes() -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster:
            asking = asyncio.create_task(failure(cluster.client, timeout_s=0.3))
            prefill, _ = await both_starts(cluster)
            assert prefill.deadline_s < 0.4  # gRPC rounds on the way
            assert (await asking).code is Code.DEADLINE_EXCEEDED
            await cluster.decode.cancels.get()

    run_async(check())


def test_a_failure_of_a_node_keeps_its_code_and_sentence() -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster:
            asking = asyncio.create_task(failure(cluster.client))
            prefill, _ = await both_starts(cluster)
            failed = node_pb2.Failed(code="RESOURCE_EXHAUSTED", message="the queue is full")
            cluster.prefill.send(prefill.ticket, failed=failed)
            error = await asking
            assert (error.code, error.message) == (Code.RESOURCE_EXHAUSTED, "the queue is full")

    run_async(check())


def test_messages_that_make_no_sense_end_one_request_and_nobody_elses() -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster:
            asking = asyncio.create_task(failure(cluster.client))
            prefill, decode = await both_starts(cluster)
            stale = common_pb2.Ticket(request_id="who", attempt=1)
            cluster.prefill.send_tokens(stale, 0, [65])
            cluster.prefill.send(prefill.ticket, finished=node_pb2.Finished())
            assert (await asking).code is Code.INTERNAL
            await cluster.decode.cancels.get()
            again = asyncio.create_task(ask(cluster.client))
            prefill, decode = await both_starts(cluster)
            prefill_script(ord("a"))(cluster.prefill, prefill.ticket)
            decode_script([ord("b")])(cluster.decode, decode.ticket)
            assert (await again)[0] == "ab"

    run_async(check())


def test_a_token_that_the_codec_cannot_read_ends_its_request_as_internal() -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster:
            asking = asyncio.create_task(failure(cluster.client))
            prefill, _ = await both_starts(cluster)
            cluster.prefill.send_tokens(prefill.ticket, 0, [-5])
            assert (await asking).code is Code.INTERNAL
            await cluster.decode.cancels.get()

    run_async(check())


def test_a_request_id_in_flight_is_refused_and_free_again_at_its_end() -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster:
            first = asyncio.create_task(ask(cluster.client, request_id="same"))
            prefill, decode = await both_starts(cluster)
            error = await failure(cluster.client, request_id="same")
            assert error.code is Code.ALREADY_EXISTS
            prefill_script(ord("a"))(cluster.prefill, prefill.ticket)
            decode_script([ord("b")])(cluster.decode, decode.ticket)
            assert (await first)[1].request_id == "same"
            second = asyncio.create_task(ask(cluster.client, request_id="same"))
            prefill, decode = await both_starts(cluster)
            prefill_script(ord("c"))(cluster.prefill, prefill.ticket)
            decode_script([])(cluster.decode, decode.ticket)
            assert (await second)[0] == "c"

    run_async(check())


def test_overload_is_answered_at_once_with_a_hint() -> None:
    async def check() -> None:
        async with fake_cluster(None, max_requests=1) as cluster:
            first = asyncio.create_task(failure(cluster.client))
            await both_starts(cluster)
            error = await failure(cluster.client)
            assert error.code is Code.RESOURCE_EXHAUSTED
            assert "try again" in error.message
            first.cancel()
            await cluster.prefill.cancels.get()

    run_async(check())


def test_a_client_that_does_not_read_loses_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.frontend.MAX_UPDATES_UNREAD", 4)

    async def check() -> None:
        async with fake_cluster(None) as cluster:
            updates = cluster.client.generate("hi", Options(max_tokens=32))
            first = asyncio.create_task(anext(updates))
            prefill, decode = await both_starts(cluster)
            cluster.prefill.send_tokens(prefill.ticket, 0, [65])
            await first
            # In one message: the reader has no turn between them, as if it did not read.
            tokens = [node_pb2.Tokens(index=index, token_ids=[65]) for index in range(1, 20)]
            cluster.decode.send_together(
                [node_pb2.LegEvent(ticket=decode.ticket, tokens=each) for each in tokens]
            )
            with pytest.raises(RequestFailed, match="unread") as raised:
                async for _ in updates:
                    pass
            assert raised.value.code is Code.RESOURCE_EXHAUSTED
            await cluster.decode.cancels.get()

    run_async(check())


@pytest.mark.parametrize(
    ("prompt", "options", "code", "sentence"),
    [
        ("", {}, Code.INVALID_ARGUMENT, "empty"),
        ([], {}, Code.INVALID_ARGUMENT, "empty"),
        ([1, 999], {}, Code.INVALID_ARGUMENT, "position 1"),
        ("x" * 64, {}, Code.INVALID_ARGUMENT, "context 64"),
        ("x" * 5000, {}, Code.INVALID_ARGUMENT, "5000 tokens"),
        ("hi", {"max_tokens": 0}, Code.INVALID_ARGUMENT, "max_tokens"),
        ("hi", {"max_tokens": 63}, Code.INVALID_ARGUMENT, "62 or less"),
        ("hi", {"temperature": float("nan")}, Code.INVALID_ARGUMENT, "temperature"),
        ("hi", {"request_id": "a\nb"}, Code.INVALID_ARGUMENT, "request_id"),
        ("hi", {"model": "gpt"}, Code.NOT_FOUND, "letters"),
        ([("robot", "hi")], {}, Code.INVALID_ARGUMENT, "template"),
    ],
)
def test_bad_input_is_refused_with_what_to_change(
    prompt: Any, options: dict[str, Any], code: Code, sentence: str
) -> None:
    async def check() -> None:
        async with running_router() as router:
            error = await failure(router.client, prompt, **options)
            assert error.code is code
            assert sentence in error.message

    run_async(check())


def test_a_request_without_input_is_refused() -> None:
    async def check() -> None:
        async with (
            running_router() as router,
            grpc.aio.insecure_channel(router.grpc_address) as channel,
        ):
            call = inference_pb2_grpc.InferenceStub(channel).Generate(
                inference_pb2.GenerateRequest()
            )
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call.read()
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run_async(check())


def test_a_message_beyond_the_limit_is_refused_and_the_next_one_served() -> None:
    async def check() -> None:
        async with fake_cluster("ok", max_message_bytes=64 << 10) as cluster:
            error = await failure(cluster.client, "x" * (100 << 10))
            assert error.code is Code.RESOURCE_EXHAUSTED
            assert (await ask(cluster.client))[0] == "ok"

    run_async(check())


def test_without_nodes_a_request_is_told_what_to_start() -> None:
    async def check() -> None:
        async with running_router() as router:
            error = await failure(router.client)
            assert error.code is Code.UNAVAILABLE
            assert "baton prefill" in error.message
            await router.join(FakeNode(Leg.PREFILL, 11, None, LAYOUT))
            error = await failure(router.client)
            assert error.code is Code.UNAVAILABLE

    run_async(check())


def test_chat_and_token_ids_reach_the_prefill_node() -> None:
    async def check() -> None:
        async with fake_cluster("ok") as cluster:
            await ask(cluster.client, [("system", "be"), ("user", "hi")])
            start = await cluster.prefill.starts.get()
            assert bytes(start.prompt_token_ids).decode() == "s:beu:hi"
            await ask(cluster.client, [5, 6, 7])
            assert list((await cluster.prefill.starts.get()).prompt_token_ids) == [5, 6, 7]

    run_async(check())


def test_many_requests_at_once_keep_their_answers_apart() -> None:
    async def check() -> None:
        async with fake_cluster("hello") as cluster:
            answers = await asyncio.gather(*(ask(cluster.client, "hi") for _ in range(50)))
            assert [text for text, _ in answers] == ["hello"] * 50
            assert len({completion.request_id for _, completion in answers}) == 50

    run_async(check())


def test_a_chunk_carries_at_least_one_token_or_text() -> None:
    async def check() -> None:
        async with fake_cluster("hello") as cluster:
            async for update in cluster.client.generate("hi"):
                if isinstance(update, Chunk):
                    assert update.token_ids or update.text

    run_async(check())
