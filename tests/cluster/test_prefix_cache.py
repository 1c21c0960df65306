"""What was computed for one prompt serves another that begins alike, and none of another tenant."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc

from baton.block_hash import chain_of
from baton.cache_events import replay
from baton.client import Client, Options
from baton.wire import cache_events_from_proto
from protos import node_pb2, node_pb2_grpc
from tests.cluster.running import RunningCluster, answer, running_cluster

PROMPT = [(number * 37 + 11) % 49_000 for number in range(600)]
OPTIONS = Options(max_tokens=6, ignore_eos=True, cache_salt="prefix cache")


def test_a_prompt_that_comes_again_is_computed_from_its_last_block_on(
    cluster: RunningCluster, client: Client
) -> None:
    before = cluster.status("prefill-0").counters["prompt_tokens"]
    first = answer(client, PROMPT, OPTIONS)
    again = answer(client, PROMPT, OPTIONS)
    longer = answer(client, [*PROMPT[:590], 5, 6, 7], OPTIONS)
    cached = [got.completion.cached_tokens for got in (first, again, longer)]
    assert cached == [0, 592, 576]
    computed = cluster.status("prefill-0").counters["prompt_tokens"] - before
    assert computed == 600 + 8 + 17
    assert again.token_ids == first.token_ids
    fresh = answer(client, [*PROMPT[:590], 5, 6, 7], replace(OPTIONS, cache_salt="unseen"))
    assert (fresh.completion.cached_tokens, fresh.token_ids) == (0, longer.token_ids)


def test_whoever_watches_a_cache_knows_what_it_holds(
    cluster: RunningCluster, client: Client
) -> None:
    salt = "watched"
    chain = chain_of(16, salt, PROMPT[:64])
    answer(client, PROMPT[:64], replace(OPTIONS, cache_salt=salt))
    with grpc.insecure_channel(cluster.nodes["prefill-0"]) as channel:
        stub = node_pb2_grpc.NodeStub(channel)
        watch = stub.WatchCache(node_pb2.WatchCacheRequest(), timeout=30.0)
        first = next(iter(watch))
        held: dict[bytes, bytes | None] = {}
        replay(held, cache_events_from_proto(first))
        assert first.anew
        assert first.epoch == cluster.status("prefill-0").epoch
        assert set(chain) <= held.keys()
        longer = chain_of(16, salt, PROMPT[:96])
        assert not set(longer) <= held.keys()
        answer(client, PROMPT[:96], replace(OPTIONS, cache_salt=salt))
        news = next(iter(watch))
        replay(held, cache_events_from_proto(news))
        assert not news.anew
        assert set(longer) <= held.keys()
        watch.cancel()
        # A reader that comes back goes on where it was.
        again = node_pb2.WatchCacheRequest(epoch=first.epoch, next_number=first.next_number)
        resumed = next(iter(stub.WatchCache(again, timeout=30.0)))
        assert (resumed.anew, resumed.next_number) == (False, news.next_number)
        assert resumed.events == news.events


def test_answers_stay_the_same_through_preemption() -> None:
    """Four answers at once need more blocks than there are: some wait, and none changes."""
    story = "Once upon a time there was a keeper of a lighthouse who counted the ships. " * 5
    prompts = [f"Chapter {number}. {story}" for number in range(1, 5)]
    options = [  # a few likely tokens: no near-tie that rounding could decide
        Options(max_tokens=100, ignore_eos=True, temperature=0.7 * (seed % 2), top_k=10, seed=seed)
        for seed in range(4)
    ]
    with running_cluster("--kv-memory-mib=24") as small, small.client() as client:
        ask = list(zip(prompts, options, strict=True))
        alone = [answer(client, prompt, option).token_ids for prompt, option in ask]
        assert small.status("decode-0").counters["preemptions"] == 0
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(lambda pair: answer(client, *pair), ask))
        assert [got.token_ids for got in together] == alone
        status = small.status("decode-0")
        assert status.counters["preemptions"] > 0
        degraded = [got.completion.timing["degraded"] for got in together]
        assert ["preempted"] in degraded, "and it says so (P10)"
        small.wait_quiet("prefill-0", "decode-0")
