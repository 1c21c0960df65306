"""P4: what passes over a link is cut without gap or overlap, and what arrived is known exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from baton.kv_layout import ELEMENT_BYTES, Layout, row_bytes
from kvtransfer.layout import MAX_UNIT_BYTES, PIECE_BYTES, Coverage, Unit, pieces

LAYOUTS = st.builds(
    Layout,
    model_fingerprint=st.just("model"),
    dtype=st.sampled_from(sorted(ELEMENT_BYTES)),
    layers=st.integers(1, 6),
    kv_heads=st.integers(1, 8),
    head_dim=st.integers(1, 16),
)
TOKENS = st.integers(1, 12)


@given(st.integers(0, MAX_UNIT_BYTES))
@example(0)
@example(1)
@example(PIECE_BYTES - 1)
@example(PIECE_BYTES)
@example(PIECE_BYTES + 1)
@example(MAX_UNIT_BYTES)
def test_pieces_cover_every_byte_once_in_order(total_bytes: int) -> None:
    reached = 0
    for start, stop in pieces(total_bytes):
        assert start == reached
        assert stop > start
        reached = stop
    assert reached == total_bytes


@given(st.integers(0, MAX_UNIT_BYTES))
def test_no_piece_is_too_large_for_a_dead_peer_to_be_noticed(total_bytes: int) -> None:
    """gloo notices a killed peer at once in messages up to 1 MiB."""
    assert all(stop - start <= 1 << 20 for start, stop in pieces(total_bytes))
    assert len(list(pieces(total_bytes))) == -(-total_bytes // PIECE_BYTES)


@given(LAYOUTS, TOKENS)
def test_a_units_size_is_the_size_of_its_tensor(layout: Layout, tokens: int) -> None:
    dtype = getattr(torch, layout.dtype)
    row = row_bytes(layout.dtype, layout.head_dim) // dtype.itemsize
    unit = torch.empty(layout.kv_heads, 2, tokens, row, dtype=dtype)
    assert layout.unit_bytes(tokens) == unit.nbytes
    assert layout.head_bytes(tokens) == unit[0].nbytes


@given(LAYOUTS, st.lists(TOKENS, min_size=1, max_size=6))
def test_the_units_of_a_prompt_add_up_to_the_prompt(layout: Layout, chunks: list[int]) -> None:
    units = layout.layers * sum(layout.unit_bytes(tokens) for tokens in chunks)
    assert layout.prompt_bytes(sum(chunks)) == units


def test_a_bfloat16_unit_takes_half_the_bytes() -> None:
    layout = Layout("model", "float32", 2, 3, 64)
    assert layout.unit_bytes(5) == 3 * 2 * 5 * 64 * 4
    assert replace(layout, dtype="bfloat16").unit_bytes(5) == layout.unit_bytes(5) // 2


def test_a_unit_counts_the_tokens_of_its_span() -> None:
    assert Unit(0, 3, 10).tokens == 7


def units_of(layers: int, chunks: list[int]) -> list[list[Unit]]:
    """For each layer, its units in order."""
    stops = [sum(chunks[: number + 1]) for number in range(len(chunks))]
    starts = [0, *stops[:-1]]
    return [
        [Unit(layer, start, stop) for start, stop in zip(starts, stops, strict=True)]
        for layer in range(layers)
    ]


@given(st.integers(1, 4), st.lists(TOKENS, min_size=1, max_size=5), st.data())
def test_a_prompt_is_complete_with_its_last_unit_however_the_layers_mix(
    layers: int, chunks: list[int], data: st.DataObject
) -> None:
    left = units_of(layers, chunks)
    coverage = Coverage(layers, sum(chunks))
    while any(left):
        assert not coverage.complete
        layer = data.draw(st.sampled_from([n for n, units in enumerate(left) if units]))
        assert coverage.add(left[layer].pop(0))
    assert coverage.complete


@given(
    st.integers(1, 3),
    st.integers(1, 8),
    st.lists(st.builds(Unit, st.integers(-1, 4), st.integers(-2, 10), st.integers(-2, 10))),
)
def test_coverage_takes_exactly_the_next_span_of_a_layer(
    layers: int, tokens: int, arriving: list[Unit]
) -> None:
    """Against a model that keeps every token it was given."""
    arrived: list[list[int]] = [[] for _ in range(layers)]
    coverage = Coverage(layers, tokens)
    for unit in arriving:
        expected = list(range(unit.start, unit.stop))
        fits = (
            0 <= unit.layer < layers
            and bool(expected)
            and arrived[unit.layer] + expected == list(range(unit.stop))
            and unit.stop <= tokens
        )
        assert coverage.add(unit) == fits
        if fits:
            arrived[unit.layer] += expected
        assert coverage.complete == all(layer == list(range(tokens)) for layer in arrived)


@pytest.mark.parametrize(
    ("unit", "why"),
    [
        (Unit(0, 0, 4), "a repeat"),
        (Unit(0, 5, 8), "a gap"),
        (Unit(0, 3, 8), "an overlap"),
        (Unit(0, 4, 9), "past the prompt"),
        (Unit(0, 4, 4), "empty"),
        (Unit(0, 4, 3), "backwards"),
        (Unit(2, 0, 4), "a layer too many"),
        (Unit(-1, 0, 4), "a layer before the first"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refused_unit_changes_nothing(unit: Unit, why: str) -> None:
    coverage = Coverage(layers=2, tokens=8)
    assert coverage.add(Unit(0, 0, 4))
    before = repr(coverage)
    assert not coverage.add(unit), why
    assert repr(coverage) == before
    for following in (Unit(0, 4, 8), Unit(1, 0, 8)):
        assert coverage.add(following)
    assert coverage.complete
