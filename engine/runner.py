"""The step interface: a scheduler's plan in, tokens out. One runner, one thread at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.errors import ConfigError
from baton.model.spec import ModelSpec
from baton.sampling import SamplingParams
from engine.accounting import Meter, decode_work, prefill_work
from engine.block_pool import blocks_for
from engine.kv_cache import PagedKvCache, blocks_that_fit
from engine.limits import measure_limits
from engine.model import Llama
from engine.sampler import choose
from engine.weights import ModelWeights, load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """The next tokens of one prompt; `sample` is set on the last chunk, which gives a token."""

    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    sample: SamplingParams | None


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """Feed `token_id` at `position` of a sequence; choose the token at `position + 1`."""

    token_id: int
    position: int
    block_table: tuple[int, ...]
    sampling: SamplingParams


class Runner:
    """A loaded model over its cache. Threads are the caller's: `torch.set_num_threads`."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, cache: PagedKvCache) -> None:
        self.spec = spec
        self.cache = cache
        self.meter = Meter()
        self._model = Llama(spec, weights, cache)
        self._dtype_name = next(name for name, dtype in DTYPES.items() if dtype == cache.dtype)

    @classmethod
    def load(
        cls,
        folder: Path,
        spec: ModelSpec,
        dtype: str,
        device: str,
        block_size: int,
        kv_memory_bytes: int,
    ) -> Runner:
        """Load a model's weights and give it a cache. Raises `ConfigError`, `UnsupportedModel`."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda, but torch finds no GPU here; use --device cpu")
        kind, place = DTYPES[dtype], torch.device(device)
        blocks = blocks_that_fit(spec, kind, block_size, kv_memory_bytes)
        weights = load_weights(folder, spec, kind, place)
        cache = PagedKvCache(spec, blocks, block_size, kind, place)
        return cls(spec, weights, cache)

    @torch.inference_mode()
    def prefill(
        self, chunk: PrefillChunk, on_layer: Callable[[int], None] | None = None
    ) -> int | None:
        """Compute a chunk; the token after the prompt if the chunk asks for it.

        `on_layer(layer)` is called, on this thread, when the chunk's KV of a layer is in the cache.
        """
        begun = time.perf_counter()
        logits = self._model.prefill(chunk.token_ids, chunk.start, chunk.block_table, on_layer)
        position = chunk.start + len(chunk.token_ids)
        token_id = (
            None if chunk.sample is None else choose(logits[None], [chunk.sample], [position])[0]
        )
        work = prefill_work(self.spec, self._dtype_name, chunk.start, len(chunk.token_ids))
        self.meter.add("prefill", work, time.perf_counter() - begun)
        return token_id

    @torch.inference_mode()
    def decode(self, rows: Sequence[DecodeRow]) -> list[int]:
        """One step of every row: the next token of each, in order."""
        if not rows:
            return []
        begun = time.perf_counter()
        logits = self._model.decode(
            [row.token_id for row in rows],
            [row.position for row in rows],
            [row.block_table for row in rows],
        )
        next_positions = [row.position + 1 for row in rows]
        token_ids = choose(logits, [row.sampling for row in rows], next_positions)
        work = decode_work(self.spec, self._dtype_name, next_positions)
        self.meter.add("decode", work, time.perf_counter() - begun)
        return token_ids

    def warm_up(self) -> None:
        """One small real prefill and decode step, on blocks that nobody owns yet; and the limits.

        What follows is counted from zero, with a bound for each step.
        """
        greedy = SamplingParams()
        block_table = tuple(range(blocks_for(2, self.cache.block_size)))
        token_id = self.prefill(PrefillChunk((0,), 0, block_table, greedy))
        assert token_id is not None, "the last chunk gives a token"
        if len(block_table) <= self.cache.blocks:
            self.decode([DecodeRow(token_id, 1, block_table, greedy)])
        self.meter.reset()
        self.meter.limits = measure_limits(self.cache.dtype, self.cache.device)
