"""The counted work is that of the model's real matrices."""

from __future__ import annotations

from dataclasses import replace

from bench.work import decode_step, matrix_weights, prefill
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


def test_the_default_model_has_135_million_weights() -> None:
    norms = SMALL.hidden_size * (2 * SMALL.layers + 1)
    embedding = SMALL.vocabulary_size * SMALL.hidden_size
    assert matrix_weights(SMALL) + embedding + norms == 134_515_008


def test_a_decode_step_reads_the_weights_once_and_each_row_its_own_kv() -> None:
    one, two = (decode_step(SMALL, "bfloat16", batch, 100).bytes_read for batch in (1, 2))
    kv_bytes = 100 * 23_040  # the KV of a token in bfloat16
    assert two - one == kv_bytes
    assert one - kv_bytes == 2 * (matrix_weights(SMALL) + 49152 * 576)


def test_prefill_grows_faster_than_its_prompt_and_float32_reads_twice_as_much() -> None:
    assert prefill(SMALL, 2048).flops > 3.9 * prefill(SMALL, 512).flops
    wide, narrow = (decode_step(SMALL, dtype, 4, 10) for dtype in ("float32", "bfloat16"))
    assert wide.bytes_read == 2 * narrow.bytes_read
    assert wide.flops == narrow.flops
