"""The HTTP door in front of a real router, over loopback."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.router.fake_nodes import (
    FakeCluster,
    fake_cluster,
    prefill_script,
    run_async,
    running_router,
)

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def http(cluster: FakeCluster) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=cluster.http_url, trust_env=False, timeout=5.0)


def events(text: str) -> list[Any]:
    """The data of each server-sent event; asserts that the last one is [DONE]."""
    *data, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(item) for item in data]


def test_a_completion_in_one_piece() -> None:
    async def check() -> None:
        async with fake_cluster("hello") as cluster, http(cluster) as client:
            reply = await client.post("/v1/completions", json={"prompt": "hi", "user": "me"})
            assert reply.status_code == 200
            body = reply.json()
            assert body["object"] == "text_completion"
            assert body["id"].startswith("cmpl-")
            assert body["model"] == "letters"
            assert body["choices"] == [
                {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}
            ]
            assert body["usage"] == {
                "prompt_tokens": 2,
                "completion_tokens": 5,
                "total_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 0},
            }
            assert json.loads(reply.headers["baton-timing"])["degraded"] == []
            start = await cluster.prefill.starts.get()
            assert start.sampling.temperature == 1.0

    run_async(check())


def test_a_chat_in_one_piece() -> None:
    async def check() -> None:
        async with fake_cluster("hello") as cluster, http(cluster) as client:
            body = (await client.post("/v1/chat/completions", json=CHAT)).json()
            assert body["object"] == "chat.completion"
            assert body["choices"][0]["message"] == {"role": "assistant", "content": "hello"}
            start = await cluster.prefill.starts.get()
            assert bytes(start.prompt_token_ids) == b"u:hi"

    run_async(check())


def test_a_chat_streams_and_ends_with_usage_and_done() -> None:
    async def check() -> None:
        async with fake_cluster("hello") as cluster, http(cluster) as client:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            reply = await client.post("/v1/chat/completions", json={**CHAT, **options})
            assert reply.headers["content-type"] == "text/event-stream"
            first, *pieces, last, usage = events(reply.text)
            assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            texts = [piece["choices"][0]["delta"]["content"] for piece in pieces]
            assert "".join(texts) == "hello"
            assert len(texts) > 1
            assert last["choices"][0]["finish_reason"] == "stop"
            assert usage["choices"] == []
            assert usage["usage"]["completion_tokens"] == 5

    run_async(check())


def test_a_completion_streams_without_usage_by_default() -> None:
    async def check() -> None:
        async with fake_cluster("hello") as cluster, http(cluster) as client:
            body = {"prompt": [104, 105], "stream": True, "max_tokens": 9, "temperature": 0}
            chunks = events((await client.post("/v1/completions", json=body)).text)
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello"
            assert not any("usage" in chunk for chunk in chunks)

    run_async(check())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_cancels_both_legs(stream: bool) -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster, http(cluster) as client:
            body = {"prompt": "hi", "stream": stream}
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            start = await cluster.prefill.starts.get()
            if stream:
                prefill_script(65)(cluster.prefill, start.ticket)
            asking.cancel()
            if not stream:
                await cluster.prefill.cancels.get()
            assert "client" in (await cluster.decode.cancels.get()).reason

    run_async(check())


def test_a_failure_before_the_first_token_has_its_status() -> None:
    async def check() -> None:
        async with fake_cluster(None, request_timeout_s=0.2) as cluster, http(cluster) as client:
            for stream in (True, False):
                body = {"prompt": "hi", "stream": stream}
                reply = await client.post("/v1/completions", json=body)
                assert reply.status_code == 504
                assert reply.json()["error"]["code"] == "deadline_exceeded"

    run_async(check())


def test_a_failure_after_the_first_token_is_an_event() -> None:
    async def check() -> None:
        async with fake_cluster(None) as cluster, http(cluster) as client:
            body = {"prompt": "hi", "stream": True}

            async def begin() -> None:
                start = await cluster.prefill.starts.get()
                prefill_script(65)(cluster.prefill, start.ticket)
                cluster.decode.send_tokens(start.ticket, 1, [66])

            beginning = asyncio.create_task(begin())
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                await beginning
                lines = reply.aiter_lines()
                assert '"text":"A"' in await anext(lines)
                await cluster.decode.stop()
                rest = "\n".join([line async for line in lines])
            assert events(rest.strip())[-1]["error"]["type"] == "server_error"

    run_async(check())


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("/v1/completions", b"{", 400, "no JSON"),
        ("/v1/completions", b"[" * 50_000, 400, "JSON"),
        ("/v1/completions", b"\xff", 400, "no JSON"),
        ("/v1/completions", b"[]", 400, "JSON object"),
        ("/v1/completions", b'{"prompt": ""}', 400, "empty"),
        ("/v1/completions", b'{"prompt": "x", "n": 2}', 400, "n is not supported"),
        ("/v1/completions", b'{"prompt": "x", "temperature": NaN}', 400, "temperature"),
        ("/v1/completions", b'{"prompt": "x", "seed": 99999999999999999999}', 400, "seed"),
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400, ""),
        ("/v1/completions", b'{"prompt": [1, 99999999999999999999]}', 400, "position 1"),
        ("/v1/chat/completions", b'{"messages": []}', 400, "messages"),
        (
            "/v1/chat/completions",
            b'{"messages": [{"role": "robot", "content": "x"}]}',
            400,
            "template",
        ),
        ("/v1/completions", b'{"prompt": "x", "model": "gpt"}', 404, "letters"),
        ("/v1/completions", b'{"prompt": "x"}', 503, "no prefill node"),
        ("/v1/completions", b'{"prompt": "' + b"x" * (70 << 10) + b'"}', 413, "65536 bytes"),
        ("/v1/nothing", b"{}", 404, "Not Found"),
    ],
)
def test_a_bad_request_gets_its_status_and_a_sentence(
    path: str, body: bytes, status: int, sentence: str
) -> None:
    async def check() -> None:
        async with running_router(max_message_bytes=64 << 10) as router, http(router) as client:
            reply = await client.post(path, content=body)
            assert reply.status_code == status
            error = reply.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert sentence in error["message"]

    run_async(check())


def test_overload_says_when_to_come_back() -> None:
    async def check() -> None:
        async with fake_cluster(None, max_requests=1) as cluster, http(cluster) as client:
            asking = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x"}))
            await cluster.prefill.starts.get()
            reply = await client.post("/v1/completions", json={"prompt": "x"})
            assert reply.status_code == 429
            assert reply.headers["retry-after"] == "1"
            asking.cancel()
            await cluster.prefill.cancels.get()

    run_async(check())


def test_health_is_always_and_readiness_only_with_both_roles() -> None:
    async def check() -> None:
        async with running_router() as router, http(router) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/ready")).status_code == 503
        async with fake_cluster("x") as cluster, http(cluster) as client:
            assert (await client.get("/ready")).status_code == 200
            models = (await client.get("/v1/models")).json()
            assert [model["id"] for model in models["data"]] == ["letters"]

    run_async(check())
