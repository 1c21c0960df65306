"""`baton ask` against a real cluster, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cluster.running import RunningCluster
from tests.cluster.test_answers import EXPECTED
from tests.fixtures.prompts import PROMPTS

[PLAIN] = [prompt for prompt in PROMPTS if prompt.name == "five-tokens"]


def baton_ask(
    cluster: RunningCluster, *arguments: str, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", "ask", "--router", cluster.grpc_address, *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=60,
    )


def last_object(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_json_is_the_last_line_and_holds_the_answer(cluster: RunningCluster) -> None:
    done = baton_ask(cluster, PLAIN.text, "--plain", "--json", "--max-tokens=24")
    found = last_object(done)
    assert found["token_ids"] == EXPECTED["five-tokens"]["token_ids"]
    assert found["finish_reason"] == "length"
    assert {"queued", "first_token", "transfer_done", "finished"} <= found["timing"].keys()
    assert done.stdout == found["text"] + "\n" + done.stdout.splitlines()[-1] + "\n"


def test_it_says_where_the_time_went(cluster: RunningCluster) -> None:
    done = baton_ask(cluster, "Say yes.", "--max-tokens=4")
    assert done.returncode == 0
    for word in ("queue", "prefill", "transfer", "decode", "total", "prompt tokens"):
        assert word in done.stderr


def test_a_prompt_comes_from_a_file_or_from_stdin(cluster: RunningCluster, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PLAIN.text)
    options = ("--plain", "--json", "--max-tokens=4")
    answers = [
        baton_ask(cluster, "--file", str(file), *options),
        baton_ask(cluster, *options, stdin=PLAIN.text),
        baton_ask(cluster, "-", *options, stdin=PLAIN.text),
    ]
    wanted = EXPECTED["five-tokens"]["token_ids"][:4]
    assert [last_object(done)["token_ids"] for done in answers] == [wanted] * 3


def test_a_seed_repeats_a_sampled_answer(cluster: RunningCluster) -> None:
    options = ("--temperature=1.2", "--seed=7", "--max-tokens=8", "--json")
    first, second = (last_object(baton_ask(cluster, "Tell a story.", *options)) for _ in range(2))
    assert first["seed"] == 7
    assert first["token_ids"] == second["token_ids"]


def test_what_fails_is_told_in_a_sentence(cluster: RunningCluster) -> None:
    refused = baton_ask(cluster, "hello", "--temperature=-1")
    assert refused.returncode == 1
    assert "temperature" in refused.stderr
    assert "INVALID_ARGUMENT" in refused.stderr
    both = baton_ask(cluster, "hello", "--file", "also.txt")
    assert both.returncode == 2
    assert "not both" in both.stderr
    assert "Traceback" not in refused.stderr + both.stderr


def test_no_router_is_told_in_a_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "ask", "--router=127.0.0.1:1", "hello"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stderr
    assert "Traceback" not in done.stderr
