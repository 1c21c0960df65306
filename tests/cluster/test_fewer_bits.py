"""KV and weights in fewer bits: less to send and to read, and nearly the same answers."""

from __future__ import annotations

import pytest

from baton.client import Options
from tests.cluster.running import RunningCluster, answer, running_cluster

ASK = [("user", "Name three colours of the rainbow.")]


def test_an_int8_cache_is_handed_over_at_less_than_a_third_of_the_bytes(
    cluster: RunningCluster,
) -> None:
    options = Options(max_tokens=12)
    with running_cluster(BATON_KV_DTYPE="int8") as narrow, narrow.client() as client:
        got = answer(client, ASK, options)
        received = narrow.status("decode-0").counters["kv_bytes_received"]
    assert received == got.completion.prompt_tokens * 2 * 30 * 3 * (64 + 4)
    with cluster.client() as client:
        wanted = answer(client, ASK, options)
    same = [a == b for a, b in zip(got.token_ids, wanted.token_ids, strict=True)]
    assert all(same[:3]), "the answer begins as it would with KV in float32"


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_weights_answer_nearly_the_same(cluster: RunningCluster, bits: str) -> None:
    options = Options(max_tokens=8)
    with cluster.client() as client:
        wanted = answer(client, ASK, options)
    with running_cluster(f"--quantize={bits}") as narrow, narrow.client() as client:
        got = answer(client, ASK, options)
        reads = narrow.status("decode-0").counters
    same = [a == b for a, b in zip(got.token_ids, wanted.token_ids, strict=False)]
    assert all(same[:2]), "the answer begins as it would in float32"
    per_step = reads["decode_bytes_read"] / reads["decode_steps"]
    assert per_step < 150e6, "of 538 MB in float32"
