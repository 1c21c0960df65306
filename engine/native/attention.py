"""Attention of one step over a paged bfloat16 cache by a kernel of our own: no padding, no copy."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch

from baton.model.spec import ModelSpec
from engine.kv_cache import PagedKvCache
from engine.native.build import kernels_for, library
from engine.segments import Segment

HEAD_DIM_STEP = 16


def serves_cache(cache: PagedKvCache) -> bool:
    """Whether the kernel reads this cache: bfloat16, on one CPU thread, and it was built."""
    return (
        cache.dtype == cache.stored == torch.bfloat16
        and cache.head_dim % HEAD_DIM_STEP == 0
        and kernels_for(cache.device) is not None
    )


class NativeStepAttention:
    """The same as `engine.attention.StepAttention`, for the caches that `serves_cache`."""

    def __init__(self, spec: ModelSpec, cache: PagedKvCache, segments: Sequence[Segment]) -> None:
        loaded = library()
        assert loaded is not None, "ask `serves_cache` first"
        self._kernel = loaded.baton_attention_bf16
        self._spec = spec
        self._cache = cache
        self._count = len(segments)
        rows, tables = array("q"), array("i")
        begin = 0
        for segment in segments:
            rows.extend((begin, len(segment.token_ids), segment.start, len(tables)))
            tables.extend(segment.block_table)
            begin += len(segment.token_ids)
            assert len(segment.block_table) * cache.block_size >= segment.stop
        self._tokens = begin
        self._rows, self._tables = rows, tables  # the kernel reads their memory

    def attend(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """What the queries, [tokens, query_heads, head_dim], see: [tokens, heads * head_dim]."""
        tokens, heads, dims = queries.shape
        assert tokens == self._tokens
        if queries.stride(2) != 1 or queries.stride(1) != dims:
            queries = queries.contiguous()
        cache = self._cache
        out = queries.new_empty((tokens, heads * dims))
        failed = self._kernel(
            queries.data_ptr(),
            queries.stride(0),
            cache.keys[layer].data_ptr(),
            cache.values[layer].data_ptr(),
            out.data_ptr(),
            self._rows.buffer_info()[0],
            self._count,
            self._tables.buffer_info()[0],
            cache.block_size,
            heads,
            cache.kv_heads,
            dims,
            self._spec.window_of(layer) or 0,
            ctypes.c_float(dims**-0.5),
        )
        if failed:
            raise MemoryError("no memory for attention's sums")
        return out
