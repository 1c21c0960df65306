"""P3: what the cluster answers equals what one process answers, token for token.

Real processes and the default model in float32: greedy against an independent implementation's
tokens, sampled against the engine alone.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baton.client import Client, Options, Prompt
from baton.model import locate
from baton.model.text import TextCodec
from baton.sampling import SamplingParams, StopParams
from engine.generate import generate
from engine.runner import Runner
from tests.cluster.running import RunningCluster, answer
from tests.fixtures.prompts import PROMPTS

FIXTURE = Path(__file__).parents[1] / "fixtures" / "expected_tokens.json"
EXPECTED: dict[str, dict[str, Any]] = {
    item["name"]: item for item in json.loads(FIXTURE.read_text())["answers"]
}
SEED = 20_250_721
SAMPLED = Options(temperature=0.9, top_k=50, top_p=0.95, min_p=0.02, seed=SEED, max_tokens=12)


def as_sent(name: str) -> Prompt:
    """A fixture's prompt as a client sends it: text or messages."""
    [prompt] = [prompt for prompt in PROMPTS if prompt.name == name]
    if prompt.kind == "plain":
        return prompt.text
    return [(message["role"], message["content"]) for message in prompt.messages]


def greedy(name: str) -> Options:
    [max_tokens] = [prompt.max_tokens for prompt in PROMPTS if prompt.name == name]
    return Options(max_tokens=max_tokens)


def test_there_are_prompts_enough() -> None:
    lengths = [len(item["prompt_token_ids"]) for item in EXPECTED.values()]
    assert len(lengths) >= 12
    assert min(lengths) <= 5
    assert max(lengths) >= 2500
    assert {item["kind"] for item in EXPECTED.values()} == {"plain", "chat"}


@pytest.mark.parametrize("name", EXPECTED)
def test_greedy_tokens_equal_the_reference(client: Client, name: str) -> None:
    wanted = EXPECTED[name]
    got = answer(client, as_sent(name), greedy(name))
    assert got.completion.prompt_tokens == len(wanted["prompt_token_ids"])
    assert got.token_ids == wanted["token_ids"]
    assert got.completion.finish_reason == wanted["finish_reason"]
    assert got.completion.timing["degraded"] == []


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", EXPECTED)
def test_sampled_tokens_repeat_and_equal_one_process(
    client: Client, default_runner: Runner, name: str
) -> None:
    first = answer(client, as_sent(name), SAMPLED)
    again = answer(client, EXPECTED[name]["prompt_token_ids"], SAMPLED)
    alone = generate(
        default_runner,
        EXPECTED[name]["prompt_token_ids"],
        SamplingParams(temperature=0.9, top_k=50, top_p=0.95, min_p=0.02, seed=SEED),
        StopParams(12),
    )
    assert first.completion.seed == SEED
    assert first.token_ids == again.token_ids == list(alone.token_ids)
    assert first.completion.finish_reason == alone.finish_reason


def test_another_seed_gives_another_answer(client: Client) -> None:
    prompt = as_sent("five-tokens")
    answers = {
        tuple(answer(client, prompt, Options(temperature=0.9, seed=s, max_tokens=12)).token_ids)
        for s in range(3)
    }
    assert len(answers) > 1


def test_four_prompts_at_once_each_get_their_own_answer(
    cluster: RunningCluster, client: Client
) -> None:
    names = ("summary", "five-tokens", "unicode", "chunk-plus-one")
    before = cluster.status("decode-0").counters["decode_steps"]
    with ThreadPoolExecutor(len(names)) as threads:
        answers = threads.map(lambda name: answer(client, as_sent(name), greedy(name)), names)
        for name, got in zip(names, answers, strict=True):
            assert got.token_ids == EXPECTED[name]["token_ids"], name
    steps = cluster.status("decode-0").counters["decode_steps"] - before
    tokens = sum(len(EXPECTED[name]["token_ids"]) for name in names)
    assert steps < tokens - len(names), "some step computed more than one sequence"


def test_the_text_is_the_tokens_decoded(client: Client) -> None:
    codec = TextCodec.load(locate("smollm2-135m-instruct", lambda _: None))
    for name in ("unicode", "question"):
        got = answer(client, as_sent(name), greedy(name))
        assert got.text == codec.decode(got.token_ids)


def test_the_timing_record_names_every_step_in_order(client: Client) -> None:
    timing = answer(client, as_sent("unicode"), greedy("unicode")).completion.timing
    assert timing.pop("degraded") == []
    assert list(timing) == [
        "queued",
        "placed",
        "prefill_started",
        "first_token",
        "transfer_done",
        "first_decode",
        "finished",
    ]
    assert sorted(timing.values()) == list(timing.values())
    assert timing["finished"] > timing["first_token"] > 0


def test_the_nodes_count_what_their_steps_did(cluster: RunningCluster, client: Client) -> None:
    options = replace(greedy("chunk-plus-one"), cache_salt="nobody else's")
    before = [cluster.status(name).counters for name in ("prefill-0", "decode-0")]
    got = answer(client, as_sent("chunk-plus-one"), options)
    after = [cluster.status(name).counters for name in ("prefill-0", "decode-0")]
    prefill, decode = (
        {name: now[name] - then[name] for name in now}
        for then, now in zip(before, after, strict=True)
    )
    assert prefill["prefill_steps"] == 2
    assert decode["decode_steps"] == len(got.token_ids) - 1
    for kind, counted in (("prefill", prefill), ("decode", decode)):
        assert counted[f"{kind}_flops"] > 0
        assert counted[f"{kind}_bytes_read"] > 0
        assert counted[f"{kind}_busy_us"] > 0
