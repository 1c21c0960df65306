"""Clients that are not ours: one that knows only what reflection tells it, and plain HTTP."""

from __future__ import annotations

import json

import grpc
import httpx
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.cluster.running import RunningCluster
from tests.cluster.test_answers import EXPECTED

SERVICES = {
    "router": {"baton.v1.Inference", "baton.v1.Registry"},
    "prefill-0": {"baton.v1.Prefill", "baton.v1.Node"},
    "decode-0": {"baton.v1.Decode", "baton.v1.KvTransfer", "baton.v1.Node"},
}


@pytest.mark.parametrize("name", SERVICES)
def test_every_server_shows_its_services_and_their_health(
    cluster: RunningCluster, name: str
) -> None:
    with grpc.insecure_channel(cluster.nodes[name]) as channel:
        shown = set(ProtoReflectionDescriptorDatabase(channel).get_services())
        assert shown >= SERVICES[name] | {"grpc.health.v1.Health"}
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", *SERVICES[name]):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, service


def test_a_client_made_from_descriptors_alone_gets_the_answer(cluster: RunningCluster) -> None:
    wanted = EXPECTED["block-exact"]
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName("baton.v1.Inference").FindMethodByName("Generate")
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        generate = channel.unary_stream(
            "/baton.v1.Inference/Generate",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        request = request_class()
        request.token_ids.ids.extend(wanted["prompt_token_ids"])
        request.stop.max_tokens = len(wanted["token_ids"])
        call = generate(request, timeout=60)
        responses = list(call)
        timing = json.loads(dict(call.trailing_metadata())["baton-timing"])
    token_ids = [token for response in responses for token in response.chunk.token_ids]
    assert token_ids == wanted["token_ids"]
    assert responses[-1].WhichOneof("response") == "complete"
    assert timing["finished"] > 0


def test_plain_http_streams_the_same_answer(cluster: RunningCluster) -> None:
    question = "What is the capital of France?"
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 12,
        "stream": True,
    }
    url = f"http://{cluster.http_address}/v1/chat/completions"
    parts: list[str] = []
    with httpx.stream("POST", url, json=body, timeout=60) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    parts.append(choice["delta"].get("content") or "")
    assert len(parts) > 2, "the answer came in pieces"
    whole = httpx.post(url, json={**body, "stream": False}, timeout=60).json()
    assert "".join(parts) == whole["choices"][0]["message"]["content"]
    assert "Paris" in "".join(parts)
