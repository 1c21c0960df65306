"""The counted work is that of the model's matrices, and a step's bound explains its time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from baton.model.layer_rules import Experts
from baton.model.spec import ModelSpec
from baton.sampling import SamplingParams, StopParams
from engine.accounting import (
    Bound,
    Kind,
    Limits,
    Meter,
    Work,
    bound_of,
    matrix_weights,
    step_work,
    weight_bytes,
)
from engine.generate import generate
from engine.segments import Segment
from tests.engine.tiny import tiny_runner
from tests.router.samples import SPEC

SMALL = replace(
    SPEC,
    layers=30,
    query_heads=9,
    kv_heads=3,
    head_dim=64,
    hidden_size=576,
    intermediate_size=1536,
    vocabulary_size=49152,
)
WEIGHTS = matrix_weights(SMALL, 1, read=True)
PROMPT = (1, 44, 7)
KV_BYTES = 23_040  # of a token, in bfloat16


def prefill_work(spec: ModelSpec, dtype: str, start: int, tokens: int) -> Work:
    return step_work(spec, dtype, [Segment((0,) * tokens, start, (), 1)])


def decode_work(spec: ModelSpec, dtype: str, contexts: list[int]) -> Work:
    return step_work(spec, dtype, [Segment((0,), context - 1, (), 1) for context in contexts])


def test_the_default_model_has_135_million_weights() -> None:
    norms = SMALL.hidden_size * (2 * SMALL.layers + 1)
    embedding = SMALL.vocabulary_size * SMALL.hidden_size
    assert WEIGHTS + embedding + norms == 134_515_008
    assert matrix_weights(SMALL, 1, read=False) == WEIGHTS


def test_a_decode_step_reads_the_weights_once_and_each_row_its_own_kv() -> None:
    one, two = (decode_work(SMALL, "bfloat16", [100] * rows).bytes_read for rows in (1, 2))
    assert two - one == 100 * KV_BYTES
    assert one - 100 * KV_BYTES == 2 * (WEIGHTS + 49152 * 576)


def test_an_int8_cache_is_read_with_its_scales() -> None:
    row = Segment((0,), 99, (), 1)
    narrow, wide = (step_work(SMALL, "bfloat16", [row], kv) for kv in ("int8", "bfloat16"))
    assert wide.bytes_read - narrow.bytes_read == 100 * (KV_BYTES - 2 * 30 * 3 * (64 + 4))


def test_float32_reads_twice_the_bytes_for_the_same_operations() -> None:
    wide, narrow = (decode_work(SMALL, dtype, [10, 20]) for dtype in ("float32", "bfloat16"))
    assert wide.bytes_read == 2 * narrow.bytes_read
    assert wide.flops == narrow.flops


def test_the_chunks_of_a_prompt_add_up_to_the_whole_but_for_the_logits() -> None:
    whole = prefill_work(SMALL, "bfloat16", 0, 512).flops
    halves = [prefill_work(SMALL, "bfloat16", start, 256).flops for start in (0, 256)]
    assert sum(halves) - whole == 2 * 49152 * 576


def test_a_decode_step_is_a_chunk_of_one_token() -> None:
    assert decode_work(SMALL, "bfloat16", [100]) == prefill_work(SMALL, "bfloat16", 99, 1)


def test_a_step_that_chooses_nothing_reads_no_head() -> None:
    chunk = Segment((0,) * 64, 0, ())
    silent, choosing = (step_work(SMALL, "bfloat16", [replace(chunk, choices=n)]) for n in (0, 1))
    assert choosing.bytes_read - silent.bytes_read == 2 * 49152 * 576


def test_a_windowed_layer_sees_no_more_than_its_window() -> None:
    windowed = replace(SMALL, window=32, windowed_layers=tuple(range(30)))
    for length in (32, 200):
        assert decode_work(windowed, "bfloat16", [length]) == decode_work(SMALL, "bfloat16", [32])
    short = prefill_work(windowed, "bfloat16", 0, 32)
    assert short == prefill_work(SMALL, "bfloat16", 0, 32)


def test_a_token_uses_its_own_experts_and_a_batch_reads_at_most_all() -> None:
    experts = Experts(8, 2, 100, True, tuple(range(30)))
    sparse = replace(SMALL, experts=experts)
    each = 30 * 3 * 576 * 100
    uses = [matrix_weights(sparse, tokens, read=False) for tokens in (1, 50)]
    reads = [matrix_weights(sparse, tokens, read=True) for tokens in (1, 2, 50)]
    assert uses[0] == uses[1] == reads[0]
    assert (reads[1] - reads[0], reads[2] - reads[0]) == (2 * each, 6 * each)


@pytest.mark.parametrize(
    ("work", "seconds", "bound"),
    [
        (Work(100, 10), 1.1, Bound.ARITHMETIC),
        (Work(10, 100), 1.9, Bound.BANDWIDTH),
        (Work(100, 100), 2.1, Bound.OVERHEAD),
    ],
)
def test_a_step_sits_at_the_bound_that_explains_its_time(
    work: Work, seconds: float, bound: Bound
) -> None:
    assert bound_of(work, seconds, Limits(100.0, 100.0)) is bound


def test_steps_add_up() -> None:
    meter = Meter()
    meter.add(Kind.DECODE, Work(7, 5), 0.001)
    meter.limits = Limits(1.0, 1.0)
    meter.add(Kind.DECODE, Work(3, 2), 0.002)
    assert +meter.counters == {
        "decode_steps": 2,
        "decode_flops": 10,
        "decode_bytes_read": 7,
        "decode_busy_us": 3000,
        "decode_bound_by_arithmetic": 1,
    }


def test_a_runner_counts_every_step_and_none_of_its_warm_up(tiny_folder: Path) -> None:
    runner = tiny_runner(tiny_folder)
    runner.warm_up()
    assert +runner.meter.counters == {}
    assert runner.meter.limits is not None
    generate(runner, PROMPT, SamplingParams(), StopParams(5, ignore_eos=True), chunk_tokens=2)
    counted = runner.meter.counters
    assert (counted["prefill_steps"], counted["decode_steps"]) == (2, 4)
    assert counted["decode_flops"] == sum(
        decode_work(runner.spec, "float32", [tokens]).flops for tokens in (4, 5, 6, 7)
    )
    for kind in Kind:
        bounds = [counted[f"{kind}_bound_by_{bound}"] for bound in Bound]
        assert sum(bounds) == counted[f"{kind}_steps"]
        assert counted[f"{kind}_busy_us"] > 0


@pytest.mark.parametrize(
    ("quantize", "layer_bytes", "head_bytes"),
    [("none", 2.0, 2.0), ("int8", 1.0, 1.0), ("int4", 0.625, 1.0)],
)
def test_bytes_of_quantised_weights(quantize: str, layer_bytes: float, head_bytes: float) -> None:
    """An int4 group of 32 has a scale and a zero of two bytes each in bfloat16."""
    assert weight_bytes("bfloat16", quantize) == (layer_bytes, head_bytes)
