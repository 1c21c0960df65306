"""Guessed tokens change how fast an answer comes, and nothing else about it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.client import Options
from tests.cluster.running import RunningCluster, answer, running_cluster

STORY = "The old keeper counted the ships, and the old keeper counted the stars, and "


@pytest.mark.parametrize("draft", ["", "smollm2-135m-instruct"], ids=["lookup", "draft model"])
def test_an_answer_with_guesses_is_the_answer_without(cluster: RunningCluster, draft: str) -> None:
    options = Options(max_tokens=48, ignore_eos=True)
    asked = [options, replace(options, temperature=0.8, top_k=5, seed=3)]
    with cluster.client() as client:
        wanted = [answer(client, STORY, option).token_ids for option in asked]
    environment = {"BATON_GUESSES": "4", "BATON_DRAFT_MODEL": draft}
    with running_cluster(**environment) as guessing, guessing.client() as client:
        assert [answer(client, STORY, option).token_ids for option in asked] == wanted
        counters = guessing.status("decode-0").counters
        assert counters["guesses_tried"] >= counters["guesses_right"] > 0
        assert counters["decode_steps"] < 2 * 47, "some steps brought several tokens"
        if draft:
            assert counters["guesses_right"] == counters["guesses_tried"], "it guesses for itself"
        guessing.wait_quiet("prefill-0", "decode-0")
