"""P4: a head's checksum depends on its bytes alone, and every bit of them counts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from baton.model.spec import ModelSpec
from engine.kv_cache import PagedKvCache
from kvtransfer.checksum import as_bytes, head_checksums
from tests.kvtransfer.settings import CPU, make_spec

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 9))
"""KV heads, tokens, head_dim."""


def random_unit(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[kv_heads, 2, tokens, head_dim] of any bits at all, NaN among them."""
    kv_heads, tokens, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    size = kv_heads * 2 * tokens * head_dim * dtype.itemsize
    bits = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).view(kv_heads, 2, tokens, head_dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checksum_is_the_xxh3_of_the_heads_bytes(dtype: torch.dtype) -> None:
    unit = random_unit((3, 5, 4), dtype, seed=1)
    expected = [
        xxhash.xxh3_64_intdigest(bytes(head.view(torch.uint8).flatten().tolist()))
        for head in unit.unbind(0)
    ]
    assert head_checksums(unit) == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(SHAPES, st.integers(0, 1 << 32), st.data())
def test_checksums_do_not_depend_on_how_heads_are_split_over_ranks(
    dtype: torch.dtype, shape: tuple[int, int, int], seed: int, data: st.DataObject
) -> None:
    unit = random_unit(shape, dtype, seed)
    cuts = data.draw(st.sets(st.integers(1, shape[0])).map(sorted))
    edges = [0, *cuts] if shape[0] in cuts else [0, *cuts, shape[0]]
    by_rank = [
        checksum
        for first, last in pairwise(edges)
        for checksum in head_checksums(unit[first:last].clone())
    ]
    assert by_rank == head_checksums(unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(SHAPES, st.integers(0, 1 << 32), st.data())
def test_one_flipped_bit_changes_its_heads_checksum_and_no_other(
    dtype: torch.dtype, shape: tuple[int, int, int], seed: int, data: st.DataObject
) -> None:
    unit = random_unit(shape, dtype, seed)
    before = head_checksums(unit)
    bit = data.draw(st.integers(0, unit.nbytes * 8 - 1))
    as_bytes(unit)[bit // 8] ^= 1 << bit % 8
    after = head_checksums(unit)
    hit = bit // 8 // (unit.nbytes // shape[0])
    assert [head for head in range(shape[0]) if before[head] != after[head]] == [hit]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_of_a_unit_are_its_own_memory_head_by_head(dtype: torch.dtype) -> None:
    unit = random_unit((3, 2, 4), dtype, seed=2)
    flat = as_bytes(unit)
    assert flat.dtype == torch.uint8
    assert flat.shape == (unit.nbytes,)
    assert flat.data_ptr() == unit.data_ptr()
    head_bytes = unit.nbytes // 3
    for head in range(3):
        part = flat[head * head_bytes : (head + 1) * head_bytes]
        assert torch.equal(part, as_bytes(unit[head].clone()))


def test_keys_and_values_are_not_interchangeable() -> None:
    unit = random_unit((2, 3, 4), torch.float32, seed=3)
    swapped = unit.flip(1).contiguous()
    assert set(head_checksums(unit)).isdisjoint(head_checksums(swapped))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checksums_do_not_depend_on_block_size_or_table(dtype: torch.dtype) -> None:
    spec: ModelSpec = make_spec()
    data = random_unit((spec.kv_heads, 11, spec.head_dim), dtype, seed=4)
    seen = []
    for block_size, table in ((4, (5, 0, 3)), (16, (6,)), (3, (7, 1, 2, 0))):
        cache = PagedKvCache(spec, 8, block_size, dtype, CPU)
        cache.write_span(0, table, 0, 11, data)
        seen.append(head_checksums(cache.read_span(0, table, 0, 11)))
    assert seen == [head_checksums(data)] * 3
