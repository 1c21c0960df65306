"""Bad input is refused with the fitting code and a sentence, and the nodes keep serving (P1)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest

from baton.client import Client, Options, Prompt
from baton.errors import BatonError, Code
from protos import inference_pb2, inference_pb2_grpc
from tests.cluster.running import RunningCluster, answer

GOOD = "The quick brown fox"
SHORT = Options(max_tokens=2)
INVALID = Code.INVALID_ARGUMENT


@dataclass(frozen=True, slots=True)
class Bad:
    name: str
    prompt: Prompt
    options: Options
    sentence: str
    code: Code = INVALID


def sampled(**values: Any) -> Options:
    return Options(max_tokens=2, **values)


BAD = [
    Bad("empty text", "", SHORT, "prompt is empty; send at least one token"),
    Bad("no token ids", (), SHORT, "prompt is empty; send at least one token"),
    Bad("nothing left once tokenised", "\x04\x06", SHORT, "empty once tokenised"),
    Bad("ids beyond the context", [5] * 8192, SHORT, "shorten the prompt"),
    Bad("text beyond the context", "word " * 9000, SHORT, "shorten the prompt"),
    Bad("chat beyond the context", [("user", "word " * 9000)], SHORT, "shorten the prompt"),
    Bad("answer beyond the context", [5] * 8000, Options(max_tokens=500), "lower max_tokens to"),
    Bad("negative id", [5, -1], SHORT, "token id -1 at position 1"),
    Bad("id out of vocabulary", [5, 49152], SHORT, "send ids from 0 to 49151"),
    Bad("no role", [("", "hello")], SHORT, "message 0 has no role"),
    Bad("temperature is NaN", GOOD, sampled(temperature=float("nan")), "temperature"),
    Bad("temperature is infinite", GOOD, sampled(temperature=float("inf")), "temperature"),
    Bad("temperature is negative", GOOD, sampled(temperature=-0.5), "temperature"),
    Bad("top_p is NaN", GOOD, sampled(temperature=1.0, top_p=float("nan")), "top_p"),
    Bad("top_p is 0", GOOD, sampled(temperature=1.0, top_p=0.0), "top_p"),
    Bad("top_p above 1", GOOD, sampled(temperature=1.0, top_p=1.5), "top_p"),
    Bad("min_p is NaN", GOOD, sampled(temperature=1.0, min_p=float("nan")), "min_p"),
    Bad("min_p is negative", GOOD, sampled(temperature=1.0, min_p=-0.1), "min_p"),
    Bad("top_k is negative", GOOD, sampled(temperature=1.0, top_k=-4), "top_k"),
    Bad("max_tokens is 0", GOOD, Options(max_tokens=0), "max_tokens is 0; send 1 or more"),
    Bad("request id with a newline", GOOD, Options(request_id="a\nb"), "printable"),
    Bad("request id too long", GOOD, Options(request_id="x" * 1000), "at most"),
    Bad("unknown model", GOOD, Options(model="gpt-9"), "ask for 'smollm2", Code.NOT_FOUND),
    Bad("huge message", "x" * (5 << 20), SHORT, "larger than max", Code.RESOURCE_EXHAUSTED),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_input_is_refused_and_the_nodes_keep_serving(
    cluster: RunningCluster, client: Client, bad: Bad
) -> None:
    before = {name: cluster.status(name).counters["requests"] for name in ("prefill-0", "decode-0")}
    with pytest.raises(BatonError) as refused:
        answer(client, bad.prompt, bad.options)
    assert refused.value.code is bad.code, refused.value.message
    assert bad.sentence in refused.value.message
    after = {name: cluster.status(name).counters["requests"] for name in before}
    assert after == before, "no node was bothered"
    assert len(answer(client, GOOD, SHORT).token_ids) == 2


def test_a_request_without_input_is_refused(cluster: RunningCluster) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            next(stub.Generate(inference_pb2.GenerateRequest(), timeout=10.0))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "send text, token_ids or chat" in refused.value.details()


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{not json", 400, "JSON"),
        (b"[]", 400, "object"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "hi"}], "temperature": -1}, 400, "temperature"),
        ({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "hi"}], "model": "gpt-9"}, 404, "gpt-9"),
    ],
)
def test_bad_http_is_refused_with_a_sentence(
    cluster: RunningCluster, client: Client, body: Any, status: int, sentence: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"http://{cluster.http_address}/v1/chat/completions"
    reply = httpx.post(
        url, content=content, headers={"content-type": "application/json"}, timeout=10
    )
    assert reply.status_code == status, reply.text
    assert sentence in reply.json()["error"]["message"]
    assert len(answer(client, GOOD, SHORT).token_ids) == 2
