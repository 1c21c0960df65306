"""The attention kernel against a dense float64 one, over shuffled blocks of a poisoned cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention import StepAttention, step_attention
from engine.kv_cache import PagedKvCache
from engine.native.attention import NativeStepAttention, serves_cache
from engine.native.build import library
from engine.segments import Segment
from tests.engine.tiny import CPU, poison
from tests.router.samples import SPEC

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(library() is None, reason="no compiler or no AVX512-BF16 here"),
]
TOLERANCE = 6e-3  # ‖out - ref‖ / ‖ref‖: what is rounded to bfloat16 is the weights and the answer
BLOCKS = 64

LENGTHS = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 130])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int, int, int, int | None, int]:
    """Segments as (start, tokens), KV heads, group, head_dim, block size, window, seed."""
    segments = [
        (draw(st.sampled_from([0, 1, 16, 37, 64, 100])), draw(LENGTHS))
        for _ in range(draw(st.integers(1, 4)))
    ]
    return (
        segments,
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from([1, 3, 4, 8])),
        draw(st.sampled_from([16, 48, 64, 80, 96, 128])),
        draw(st.sampled_from([5, 16, 32])),
        draw(st.sampled_from([None, None, 1, 7, 64, 200])),
        draw(st.integers(0, 1000)),
    )


@settings(deadline=None, max_examples=60)
@given(shapes())
def test_every_query_sees_what_it_would_in_float64(
    shape: tuple[list[tuple[int, int]], int, int, int, int, int | None, int],
) -> None:
    spans, kv_heads, group, dims, size, window, seed = shape
    generator = torch.Generator().manual_seed(seed)
    spec = replace(
        SPEC,
        layers=2,
        query_heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=dims,
        window=window,
        windowed_layers=(1,) if window else (),
    )
    blocks = sum(-(-(start + tokens) // size) for start, tokens in spans)
    cache = PagedKvCache(spec, blocks, size, torch.bfloat16, CPU)
    poison(cache)
    order = torch.randperm(blocks, generator=generator).tolist()
    segments, wanted, queries = [], [], []
    for start, tokens in spans:
        count = -(-(start + tokens) // size)
        table, order = tuple(order[:count]), order[count:]
        stop = start + tokens
        keys, values = torch.randn(2, stop, kv_heads, dims, generator=generator).bfloat16()
        cache.write(1, cache.slots_of(table, 0, stop), keys, values)
        asked = torch.randn(tokens, kv_heads * group, dims, generator=generator).bfloat16()
        segments.append(Segment((0,) * tokens, start, table))
        queries.append(asked)
        wanted.append(dense(asked, keys, values, start, window))
    packed = torch.cat(queries)
    # As it comes from the model: a part of what q, k and v were projected into.
    strided = torch.cat((packed, torch.zeros_like(packed)), dim=1)[:, : packed.shape[1]]
    out = NativeStepAttention(spec, cache, segments).attend(1, strided)
    reference = torch.cat(wanted)
    assert (out.double() - reference).norm() <= TOLERANCE * reference.norm()


def dense(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, window: int | None
) -> torch.Tensor:
    """float64 [tokens, heads * dims]"""
    tokens, heads, dims = queries.shape
    group = heads // keys.shape[1]
    wide = [x.double().repeat_interleave(group, dim=1) for x in (keys, values)]
    scores = torch.einsum("qhd,khd->hqk", queries.double(), wide[0]) / dims**0.5
    places = torch.arange(start, start + tokens)[:, None]
    others = torch.arange(len(keys))[None, :]
    seen = others <= places
    if window is not None:
        seen &= others > places - window
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, wide[1]).reshape(tokens, -1)


def test_a_segment_gets_the_same_bits_alone_and_in_any_company() -> None:
    spec = replace(SPEC, layers=1, query_heads=6, kv_heads=2, head_dim=64)
    cache = PagedKvCache(spec, BLOCKS, 4, torch.bfloat16, CPU)
    for rows in (*cache.keys, *cache.values):
        rows.copy_(torch.randn(rows.shape))
    tables = [tuple(range(start, start + 20)) for start in (0, 20, 40)]
    shapes = [(30, 1), (0, 70), (9, 5)]
    segments = [
        Segment((0,) * tokens, start, table)
        for (start, tokens), table in zip(shapes, tables, strict=True)
    ]
    queries = [torch.randn(tokens, 6, 64).bfloat16() for _, tokens in shapes]
    together = NativeStepAttention(spec, cache, segments).attend(0, torch.cat(queries))
    alone = [
        NativeStepAttention(spec, cache, [segment]).attend(0, asked)
        for segment, asked in zip(segments, queries, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("stored", [torch.float32, torch.int8])
def test_a_cache_that_is_not_bfloat16_is_left_to_torch(stored: torch.dtype) -> None:
    dtype = torch.float32 if stored == torch.float32 else torch.bfloat16
    spec = replace(SPEC, layers=1, query_heads=2, kv_heads=2, head_dim=16)
    cache = PagedKvCache(spec, 2, 4, dtype, CPU, stored)
    assert not serves_cache(cache)
    assert isinstance(step_attention(spec, cache, [Segment((1,), 0, (0,))]), StepAttention)
