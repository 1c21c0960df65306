"""The default model's greedy float32 answers are those of transformers, token for token.

`tests/fixtures/make_expected_tokens.py` made the fixture, with no code of ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.model import locate
from baton.sampling import SamplingParams, StopParams
from engine.block_pool import blocks_for
from engine.generate import generate
from engine.memory import KvMemory
from engine.runner import Runner
from tests.engine.tiny import feed
from tests.fixtures.prompts import PROMPTS

FIXTURE = Path(__file__).parents[1] / "fixtures" / "expected_tokens.json"
ANSWERS: list[dict[str, Any]] = json.loads(FIXTURE.read_text())["answers"]
MAX_TOKENS = {prompt.name: prompt.max_tokens for prompt in PROMPTS}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("wanted", ANSWERS, ids=lambda wanted: wanted["name"])
def test_greedy_tokens_equal_the_reference(default_runner: Runner, wanted: dict[str, Any]) -> None:
    stop = StopParams(MAX_TOKENS[wanted["name"]])
    answer = generate(default_runner, wanted["prompt_token_ids"], SamplingParams(), stop)
    assert list(answer.token_ids) == wanted["token_ids"]
    assert answer.finish_reason == wanted["finish_reason"]


@pytest.mark.usefixtures("one_thread")
def test_bfloat16_stays_near_float32(default_runner: Runner) -> None:
    """The first token's logits after each short prompt; bfloat16 keeps 8 bits of each number."""
    folder = locate("smollm2-135m-instruct", lambda _: None)
    narrow = Runner.load(folder, default_runner.spec, "bfloat16", "cpu", 16, KvMemory(16 << 20))
    for wanted in ANSWERS[:3]:
        exact = first_logits(default_runner, wanted["prompt_token_ids"])
        rounded = first_logits(narrow, wanted["prompt_token_ids"])
        assert rounded.shape == (default_runner.spec.vocabulary_size,)
        assert torch.isfinite(rounded).all()
        assert torch.corrcoef(torch.stack((exact, rounded)))[0, 1] > 0.995


def first_logits(runner: Runner, prompt: list[int]) -> torch.Tensor:
    """Through the model itself: the runner gives out tokens only."""
    blocks = tuple(range(blocks_for(len(prompt), runner.cache.block_size)))
    with torch.inference_mode():
        return feed(runner._model, prompt, 0, blocks)
