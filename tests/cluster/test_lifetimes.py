"""P1, P5, P7, P9: who goes away takes nothing along; clients, nodes and whole clusters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from baton.client import Chunk, Client, Completion, Options
from baton.errors import BatonError, Code
from tests.cluster.running import (
    RunningCluster,
    answer,
    is_alive,
    running_cluster,
    wait_until,
)

ENDLESS = Options(max_tokens=4000, ignore_eos=True, timeout_s=120.0)
SHORT = Options(max_tokens=3)
CLIENT = """
import sys
from baton.client import Client, Options
with Client(sys.argv[1]) as client:
    for update in client.generate("Once upon a time", Options(max_tokens=4000, ignore_eos=True)):
        print(update, flush=True)
"""


def first_chunk(client: Client) -> list[Chunk]:
    """The first chunks of an answer that is then left."""
    stream = client.generate("Once upon a time", ENDLESS)
    chunks = [update for update, _ in zip(stream, range(3), strict=False)]
    stream.close()  # type: ignore[attr-defined]
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    return chunks  # type: ignore[return-value]


def test_killing_a_client_in_mid_stream_frees_the_blocks_on_both_nodes(
    cluster: RunningCluster,
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, cluster.grpc_address], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        for _ in range(4):
            assert "Chunk" in process.stdout.readline()
        held = cluster.status("decode-0")
        assert held.blocks_free < held.blocks_total
        assert held.requests_running == 1
        process.kill()
        process.wait()
    cluster.wait_quiet("prefill-0", "decode-0")


def test_killing_a_client_during_the_prompt_frees_the_blocks_on_both_nodes(
    cluster: RunningCluster,
) -> None:
    code = CLIENT.replace('"Once upon a time"', "[5] * 7000").replace("4000", "400")
    process = subprocess.Popen([sys.executable, "-c", code, cluster.grpc_address])
    wait_until(
        lambda: cluster.status("prefill-0").blocks_free < cluster.status("prefill-0").blocks_total,
        lambda: cluster.status("prefill-0"),
    )
    process.kill()
    process.wait()
    cluster.wait_quiet("prefill-0", "decode-0")


def test_a_client_that_stops_reading_frees_the_blocks(
    cluster: RunningCluster, client: Client
) -> None:
    assert [chunk.index for chunk in first_chunk(client)] == [0, 1, 2]
    cluster.wait_quiet("prefill-0", "decode-0")


def test_a_deadline_ends_the_request_and_frees_the_blocks(
    cluster: RunningCluster, client: Client
) -> None:
    with pytest.raises(BatonError) as ended:
        answer(client, "Once upon a time", Options(4000, ignore_eos=True, timeout_s=1.0))
    assert ended.value.code is Code.DEADLINE_EXCEEDED
    cluster.wait_quiet("prefill-0", "decode-0")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_stopping_a_cluster_lets_a_request_end_and_leaves_no_process(
    number: signal.Signals,
) -> None:
    with running_cluster() as cluster, cluster.client() as client:
        processes = list(cluster.pids.values())
        assert len(processes) == 3
        stream = client.generate("The sky is", Options(max_tokens=40, ignore_eos=True))
        assert isinstance(next(stream), Chunk)
        with ThreadPoolExecutor(1) as threads:
            rest = threads.submit(list, stream)
            assert cluster.stop(number) == 0
            last = rest.result()[-1]
        assert isinstance(last, Completion)
        assert last.completion_tokens == 40
        assert [pid for pid in processes if is_alive(pid)] == []
        noise = [line for line in cluster.lines if "warning" in line or "error" in line]
        assert noise == []


def test_killing_the_launcher_leaves_no_process() -> None:
    with running_cluster() as cluster:
        processes = list(cluster.pids.values())
        cluster.process.kill()
        cluster.process.wait()
        wait_until(
            lambda: not any(map(is_alive, processes)),
            lambda: [pid for pid in processes if is_alive(pid)],
            within_s=15,
        )


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_the_death_of_a_node_takes_no_other_with_it(victim: str) -> None:
    with (
        running_cluster(f"--{victim}=2") as cluster,
        cluster.client() as client,
        ThreadPoolExecutor(1) as threads,
    ):
        prompt = [5] * (3000 if victim == "prefill" else 30)
        asking = threads.submit(answer, client, prompt, ENDLESS)
        names = [f"{victim}-0", f"{victim}-1"]
        busy: list[str] = []

        def found_busy() -> bool:
            busy[:] = [name for name in names if cluster.status(name).requests_running]
            return bool(busy)

        wait_until(found_busy, lambda: [cluster.status(name) for name in names])
        os.kill(cluster.pids[busy[0]], signal.SIGKILL)
        with pytest.raises(BatonError) as ended:
            asking.result(30)
        assert ended.value.code is Code.UNAVAILABLE
        others = [name for name in cluster.nodes if name not in ("router", busy[0])]
        cluster.wait_quiet(*others)
        assert len(answer(client, "The sky is", SHORT).token_ids) == 3
