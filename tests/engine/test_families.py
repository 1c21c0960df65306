"""Every family computes what transformers does: whole prompts, chunks, and batches of decode steps.

`tests/fixtures/make_family_logits.py` made the expected logits, with no code of ours.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from baton.model.families import FAMILIES as FAMILY_TABLE
from baton.model.spec import load_spec
from engine.kv_cache import PagedKvCache
from engine.model import Llama
from engine.weights import load_weights
from tests.engine.tiny import CPU, feed, load_tiny, next_tokens, poison
from tests.fixtures.family_weights import (
    FAMILIES,
    NAMES,
    PROMPT,
    family_config,
    write_family_folder,
)

TABLE = (9, 2, 14, 0, 7, 3, 11)
ALL = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    return {name: write_family_folder(base / name, name) for name in NAMES}


def loaded(folder: Path) -> tuple[Llama, PagedKvCache]:
    _, model, cache = load_tiny(folder)
    poison(cache)
    return model, cache


def expected(name: str) -> torch.Tensor:
    """float32 [tokens, vocabulary]: the logits after each token of the prompt."""
    return load_file(FAMILIES / name / "logits.safetensors")["logits"]


def close(logits: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)


def test_every_supported_family_is_among_the_fixtures() -> None:
    assert {family_config(name)["model_type"] for name in NAMES} == set(FAMILY_TABLE)


@ALL
@pytest.mark.parametrize("chunk", [1, 5, len(PROMPT)])
def test_prefill_equals_transformers_at_the_end_of_every_chunk(
    folders: dict[str, Path], name: str, chunk: int
) -> None:
    model, _ = loaded(folders[name])
    wanted = expected(name)
    with torch.inference_mode():
        for start in range(0, len(PROMPT), chunk):
            token_ids = PROMPT[start : start + chunk]
            logits = feed(model, token_ids, start, TABLE)
            close(logits, wanted[start + len(token_ids) - 1])


@ALL
def test_decode_in_a_batch_equals_transformers_token_by_token(
    folders: dict[str, Path], name: str
) -> None:
    """Three sequences of the same text, each at another place in it."""
    model, _ = loaded(folders[name])
    wanted = expected(name)
    tables = (TABLE, (1, 4, 5, 6, 8, 10), (12, 13, 15, 16, 17, 18))
    lengths = [2, 13, 7]
    with torch.inference_mode():
        for table, length in zip(tables, lengths, strict=True):
            feed(model, PROMPT[:length], 0, table)
        for step in range(len(PROMPT) - max(lengths)):
            places = [length + step for length in lengths]
            logits = next_tokens(model, [PROMPT[place] for place in places], places, tables)
            close(logits, wanted[places])


@pytest.mark.parametrize("name", ["mistral", "qwen2", "smollm3_windowed"])
def test_what_lies_outside_the_window_is_not_read(folders: dict[str, Path], name: str) -> None:
    """Windowed layers lose what they no longer see, and the answer stays the same."""
    model, cache = loaded(folders[name])
    spec = model._spec
    assert spec.window is not None
    with torch.inference_mode():
        feed(model, PROMPT[:16], 0, TABLE)
        for layer in spec.windowed_layers:
            for block in TABLE[: (16 - spec.window + 1) // cache.block_size]:
                cache.keys[layer][block] = float("nan")
                cache.values[layer][block] = float("nan")
        [logits] = next_tokens(model, [PROMPT[16]], [16], [TABLE])
        close(logits, expected(name)[16])
        close(feed(model, PROMPT[17:20], 17, TABLE), expected(name)[19])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3", {"rope_scaling": None}),
        ("llama_linear", {"rope_scaling": None}),
        ("llama_linear", {"output_bias": False}),
        ("mistral", {"windowed_layers": ()}),
        ("qwen2", {"windowed_layers": ()}),
        ("qwen2", {"windowed_layers": (1, 2)}),
        ("qwen2_5", {"qkv_bias": False}),
        ("qwen3", {"qk_norm": False}),
        ("smollm3", {"layers_without_rope": ()}),
        ("smollm3_windowed", {"windowed_layers": (0, 1, 2, 3)}),
    ],
)
def test_what_sets_a_family_apart_shows_in_its_logits(
    folders: dict[str, Path], name: str, change: dict[str, Any]
) -> None:
    """The fixtures could tell: without the trait, the logits are far from the expected."""
    spec = replace(load_spec(folders[name]), **change)
    cache = PagedKvCache(spec, 24, 4, torch.float32, CPU)
    model = Llama(spec, load_weights(folders[name], spec, torch.float32, CPU), cache)
    with torch.inference_mode():
        logits = feed(model, PROMPT, 0, TABLE)
    assert (logits - expected(name)[-1]).abs().max() > 0.01
