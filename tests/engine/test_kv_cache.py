"""The paged cache: spans come back as they were written, and nothing beside them changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ConfigError
from baton.model.spec import load_spec
from engine.kv_cache import PagedKvCache, blocks_that_fit, kv_bytes_per_token
from tests.engine.tiny import CPU, poison

TABLE = (5, 0, 3)


def make_cache(folder: Path, block_size: int, blocks: int = 8) -> PagedKvCache:
    return PagedKvCache(load_spec(folder), blocks, block_size, torch.float32, CPU)


@pytest.mark.parametrize(("start", "stop"), [(0, 12), (0, 1), (3, 5), (4, 8), (7, 12), (6, 6)])
def test_a_span_comes_back_as_written_and_nothing_else_changes(
    tiny_folder: Path, start: int, stop: int
) -> None:
    cache = make_cache(tiny_folder, block_size=4)
    for layer in (*cache.keys, *cache.values):
        layer.fill_(-1.0)
    data = torch.rand(2, 2, stop - start, 8)
    cache.write_span(1, TABLE, start, stop, data)
    assert torch.equal(cache.read_span(1, TABLE, start, stop), data)
    written = data.numel()
    assert sum(int((layer != -1).sum()) for layer in (*cache.keys, *cache.values)) == written


def test_a_span_survives_another_block_size_and_table(tiny_folder: Path) -> None:
    one, other = make_cache(tiny_folder, 4), make_cache(tiny_folder, 16)
    poison(one)
    poison(other)
    data = torch.rand(2, 2, 11, 8)
    one.write_span(2, TABLE, 0, 11, data)
    other.write_span(2, (6,), 0, 11, one.read_span(2, TABLE, 0, 11))
    assert torch.equal(other.read_span(2, (6,), 0, 11), data)


def test_heads_may_travel_one_by_one(tiny_folder: Path) -> None:
    source, target = make_cache(tiny_folder, 4), make_cache(tiny_folder, 4)
    poison(target)
    data = torch.rand(2, 2, 9, 8)
    source.write_span(0, TABLE, 0, 9, data)
    for head in range(2):
        heads = range(head, head + 1)
        piece = source.read_span(0, TABLE, 0, 9, heads)
        assert torch.equal(piece, data[head : head + 1])
        target.write_span(0, (1, 2, 4), 0, 9, piece, heads)
    assert torch.equal(target.read_span(0, (1, 2, 4), 0, 9), data)


def test_a_span_is_a_contiguous_copy_in_the_buffer_given(tiny_folder: Path) -> None:
    cache = make_cache(tiny_folder, 4)
    data = torch.rand(2, 2, 6, 8)
    cache.write_span(0, TABLE, 0, 6, data)
    out = torch.empty_like(data)
    assert cache.read_span(0, TABLE, 0, 6, out=out) is out
    copy = cache.read_span(0, TABLE, 0, 6)
    assert copy.is_contiguous()
    poison(cache)
    assert torch.equal(out, data)
    assert torch.equal(copy, data)


def test_a_span_holds_keys_before_values_of_the_tokens_written(tiny_folder: Path) -> None:
    cache = make_cache(tiny_folder, 4)
    keys, values = torch.rand(10, 2, 8), torch.rand(10, 2, 8)
    cache.write(0, cache.slots_of(TABLE, 0, 10), keys, values)
    span = cache.read_span(0, TABLE, 2, 10)
    assert torch.equal(span[:, 0], keys[2:].transpose(0, 1))
    assert torch.equal(span[:, 1], values[2:].transpose(0, 1))
    assert torch.equal(cache.keys[0][0, 1], keys[5])  # token 5: second block of the table, offset 1


def test_slots_follow_the_block_table(tiny_folder: Path) -> None:
    cache = make_cache(tiny_folder, 4)
    assert cache.slots_of(TABLE, 2, 9).tolist() == [22, 23, 0, 1, 2, 3, 12]
    with pytest.raises(IndexError):
        cache.slots_of(TABLE, 0, 13)


NORMALS = st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-4 else 0.0)


@given(
    st.integers(1, 6).flatmap(
        lambda tokens: st.lists(NORMALS, min_size=tokens * 16, max_size=tokens * 16)
    )
)
def test_int8_keeps_every_number_to_half_a_step_of_its_token_and_head(
    tiny_folder: Path, numbers: list[float]
) -> None:
    cache = PagedKvCache(load_spec(tiny_folder), 4, 4, torch.float32, CPU, torch.int8)
    for rows in (*cache.keys, *cache.values):
        rows.view(torch.uint8).fill_(0xFF)
    kv = torch.tensor(numbers).view(-1, 2, 8)
    slots = cache.slots_of((2, 0), 0, len(kv))
    cache.write(1, slots, kv, -kv)
    keys, values = cache.read(1, slots)
    half_a_step = kv.abs().amax(-1, keepdim=True) / 127 * 0.5001
    assert ((keys - kv).abs() <= half_a_step).all()
    assert torch.equal(values, -keys)


def test_int8_spans_travel_with_their_scales(tiny_folder: Path) -> None:
    source, target = (
        PagedKvCache(load_spec(tiny_folder), 8, size, torch.float32, CPU, torch.int8)
        for size in (4, 16)
    )
    keys, values = torch.randn(2, 11, 2, 8)
    source.write(0, source.slots_of(TABLE, 0, 11), keys, values)
    span = source.read_span(0, TABLE, 0, 11)
    assert (span.dtype, tuple(span.shape)) == (torch.int8, (2, 2, 11, 12))
    target.write_span(0, (6,), 0, 11, span)
    sent = source.read(0, source.slots_of(TABLE, 0, 11))
    come = target.read(0, target.slots_of((6,), 0, 11))
    assert all(torch.equal(one, other) for one, other in zip(sent, come, strict=True))


@pytest.mark.parametrize("heads", [range(3), range(1, 1), range(0, 2, 2)])
def test_a_run_of_heads_that_cannot_be_is_our_mistake(tiny_folder: Path, heads: range) -> None:
    with pytest.raises(AssertionError):
        make_cache(tiny_folder, 4).read_span(0, TABLE, 0, 1, heads)


def test_memory_is_counted_in_whole_blocks(tiny_folder: Path) -> None:
    spec = load_spec(tiny_folder)
    token_bytes = kv_bytes_per_token(spec, torch.float32)
    assert token_bytes == 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, head_dim, float32
    assert kv_bytes_per_token(spec, torch.bfloat16) * 2 == token_bytes
    assert kv_bytes_per_token(spec, torch.int8) == 2 * 3 * 2 * (8 + 4)
    assert blocks_that_fit(spec, torch.float32, 16, 5 * 16 * token_bytes + 1) == 5
    with pytest.raises(ConfigError, match="kv-memory-mib"):
        blocks_that_fit(spec, torch.float32, 16, 16 * token_bytes - 1)
