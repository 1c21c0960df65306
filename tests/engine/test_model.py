"""The paged forward pass: equal to a dense float64 one however a prompt is cut up and batched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.kv_cache import PagedKvCache
from engine.model import Llama
from tests.engine.tiny import (
    dense_logits,
    feed,
    load_tiny,
    next_tokens,
    poison,
    tiny_weights,
    write_folder,
)

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # float32 against float64, logits of size 1 to 10
PROMPT = [(number * 31 + 5) % 97 for number in range(22)]
TABLE = (9, 2, 14, 0, 7, 3, 11)


def close(logits: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(logits.double(), wanted, **TOLERANCE)


def prefill_all(
    model: Llama, prompt: list[int], table: tuple[int, ...], chunk: int = 64
) -> torch.Tensor:
    """Logits after the whole prompt, computed in chunks."""
    with torch.inference_mode():
        for start in range(0, len(prompt), chunk):
            logits = feed(model, prompt[start : start + chunk], start, table)
    return logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 7, 22])
def test_prefill_equals_the_dense_reference_at_the_end_of_every_chunk(
    tmp_path: Path, chunk: int, tied: bool
) -> None:
    weights = tiny_weights(tied)
    _, model, cache = load_tiny(write_folder(tmp_path / "model", weights))
    poison(cache)
    wanted = dense_logits(weights, PROMPT)
    with torch.inference_mode():
        for start in range(0, len(PROMPT), chunk):
            token_ids = PROMPT[start : start + chunk]
            logits = feed(model, token_ids, start, TABLE)
            close(logits, wanted[start + len(token_ids) - 1])


def test_decode_equals_the_dense_reference_across_block_borders(tiny_folder: Path) -> None:
    _, model, cache = load_tiny(tiny_folder)
    poison(cache)
    wanted = dense_logits(tiny_weights(), PROMPT)
    prefill_all(model, PROMPT[:6], TABLE)
    with torch.inference_mode():
        for position in range(6, len(PROMPT)):
            [logits] = next_tokens(model, [PROMPT[position]], [position], [TABLE])
            close(logits, wanted[position])


def test_a_batch_answers_as_each_row_would_alone(tiny_folder: Path) -> None:
    _, model, cache = load_tiny(tiny_folder)
    poison(cache)
    prompts = [PROMPT[:1], PROMPT[3:16], PROMPT[2:10], PROMPT[:15], PROMPT[5:9]]
    tables = [(4,), (1, 13, 5, 20), (6, 8), (10, 12, 15, 16), (17,)]
    for prompt, table in zip(prompts, tables, strict=True):
        if prompt[:-1]:
            prefill_all(model, prompt[:-1], table)
    with torch.inference_mode():
        together = next_tokens(
            model, [p[-1] for p in prompts], [len(p) - 1 for p in prompts], tables
        )
        for row, (prompt, table) in enumerate(zip(prompts, tables, strict=True)):
            [alone] = next_tokens(model, [prompt[-1]], [len(prompt) - 1], [table])
            torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)
            close(together[row], dense_logits(tiny_weights(), prompt)[-1])


def test_what_other_blocks_hold_never_reaches_a_result(tiny_folder: Path) -> None:
    """One row's KV is NaN, and so is every block without an owner: the others do not notice."""
    _, model, cache = load_tiny(tiny_folder)
    poison(cache)
    tables = [(0,), (1, 2, 3), (4, 5)]
    prompts = [PROMPT[:2], PROMPT[:11], PROMPT[4:9]]
    for prompt, table in zip(prompts, tables, strict=True):
        prefill_all(model, prompt[:-1], table)
    poison(cache, keep=(1, 2, 3, 4, 5))  # the first row's KV is lost
    with torch.inference_mode():
        logits = next_tokens(model, [p[-1] for p in prompts], [len(p) - 1 for p in prompts], tables)
    assert logits[0].isnan().all()
    for row in (1, 2):
        close(logits[row], dense_logits(tiny_weights(), prompts[row])[-1])


def test_a_block_table_may_be_longer_than_the_sequence(tiny_folder: Path) -> None:
    _, model, cache = load_tiny(tiny_folder)
    poison(cache)
    wanted = dense_logits(tiny_weights(), PROMPT[:6])
    prefill_all(model, PROMPT[:5], TABLE)
    with torch.inference_mode():
        close(next_tokens(model, [PROMPT[5]], [5], [TABLE])[0], wanted[-1])


@pytest.mark.parametrize("block_size", [1, 5, 32])
def test_the_block_size_changes_nothing(tiny_folder: Path, block_size: int) -> None:
    _, model, cache = load_tiny(tiny_folder, blocks=32, block_size=block_size)
    poison(cache)
    table = tuple(reversed(range(-(-len(PROMPT) // block_size))))
    close(prefill_all(model, PROMPT, table, 9), dense_logits(tiny_weights(), PROMPT)[-1])


def test_each_layer_is_named_once_its_kv_is_whole(tiny_folder: Path) -> None:
    """What the hand-off reads inside `on_layer` is what is there at the end."""
    _, model, cache = load_tiny(tiny_folder)
    poison(cache)
    spans: list[tuple[int, torch.Tensor]] = []

    def on_layer(layer: int) -> None:
        spans.append((layer, cache.read_span(layer, TABLE, 8, 13)))

    prefill_all(model, PROMPT[:8], TABLE)
    with torch.inference_mode():
        feed(model, PROMPT[8:13], 8, TABLE, on_layer)
    assert [layer for layer, _ in spans] == [0, 1, 2]
    for layer, span in spans:
        assert torch.isfinite(span).all()
        assert torch.equal(span, cache.read_span(layer, TABLE, 8, 13))


def test_decode_continues_on_a_cache_that_was_handed_over(tiny_folder: Path) -> None:
    _, sender, source = load_tiny(tiny_folder, block_size=4)
    _, receiver, target = load_tiny(tiny_folder, block_size=16)
    poison(source)
    poison(target)
    prefill_all(sender, PROMPT[:-1], TABLE)
    hand_over(source, target, len(PROMPT) - 1)
    with torch.inference_mode():
        [logits] = next_tokens(receiver, [PROMPT[-1]], [len(PROMPT) - 1], [(3, 1)])
    close(logits, dense_logits(tiny_weights(), PROMPT)[-1])


def hand_over(source: PagedKvCache, target: PagedKvCache, tokens: int) -> None:
    for layer in range(3):
        target.write_span(layer, (3, 1), 0, tokens, source.read_span(layer, TABLE, 0, tokens))


def test_bfloat16_computes_the_same_model(tiny_folder: Path) -> None:
    _, model, cache = load_tiny(tiny_folder, dtype=torch.bfloat16)
    poison(cache)
    logits = prefill_all(model, PROMPT, TABLE, 7)
    wanted = dense_logits(tiny_weights(), PROMPT)[-1]
    assert logits.dtype == torch.float32
    assert torch.corrcoef(torch.stack((logits.double(), wanted)))[0, 1] > 0.999


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8])
def test_a_cache_of_fewer_bits_holds_the_same_model(tiny_folder: Path, stored: torch.dtype) -> None:
    _, model, cache = load_tiny(tiny_folder, stored=stored)
    poison(cache)
    prefill_all(model, PROMPT[:-1], TABLE, 7)
    with torch.inference_mode():
        [logits] = next_tokens(model, [PROMPT[-1]], [len(PROMPT) - 1], [TABLE])
    wanted = dense_logits(tiny_weights(), PROMPT)[-1]
    assert not torch.allclose(logits.double(), wanted, rtol=1e-6), "it was stored as it was"
    assert torch.corrcoef(torch.stack((logits.double(), wanted)))[0, 1] > 0.999
