"""The step interface: segments in, chosen tokens out. One runner, one thread at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch

from baton.errors import ConfigError
from baton.model.spec import ModelSpec
from engine.accounting import Kind, Meter, step_work
from engine.block_pool import blocks_for
from engine.kv_cache import PagedKvCache, blocks_that_fit, dtype_name
from engine.limits import measure_limits
from engine.linears import PLAIN, Linears, check_quantise
from engine.memory import KvMemory, kv_bytes
from engine.model import Llama
from engine.sampler import choose
from engine.segments import Segment
from engine.weights import ModelWeights, load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KV_DTYPES = DTYPES | {"int8": torch.int8}


class Runner:
    """A loaded model over its cache. Threads are the caller's: `torch.set_num_threads`."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        cache: PagedKvCache,
        linears: Linears = PLAIN,
    ) -> None:
        self.spec = spec
        self.cache = cache
        self.meter = Meter()
        self._model = Llama(spec, weights, cache, linears)
        self._quantize = linears.quantize

    @classmethod
    def load(
        cls,
        folder: Path,
        spec: ModelSpec,
        dtype: str,
        device: str,
        block_size: int,
        kv: KvMemory,
        kv_dtype: str = "",
        quantize: str = "none",
    ) -> Runner:
        """Load a model's weights and give it a cache. Raises `ConfigError`, `UnsupportedModel`.

        The cache stores `kv_dtype`, or `dtype` where that is empty.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda, but torch finds no GPU here; use --device cpu")
        check_quantise(quantize, spec, device)
        kind, place = DTYPES[dtype], torch.device(device)
        stored = KV_DTYPES[kv_dtype or dtype]
        if kv.asked_bytes:
            blocks_that_fit(spec, stored, block_size, kv.asked_bytes)  # or say so at once
        weights = load_weights(folder, spec, kind, place)
        blocks = kv.blocks or blocks_that_fit(spec, stored, block_size, kv_bytes(kv, place))
        cache = PagedKvCache(spec, blocks, block_size, kind, place, stored)
        return cls(spec, weights, cache, Linears(quantize, folder, weights.kept))

    @torch.inference_mode()
    def step(
        self,
        segments: Sequence[Segment],
        on_layer: Callable[[int], None] | None = None,
        kind: Kind = Kind.DECODE,
    ) -> list[list[int]]:
        """Compute a step; the tokens chosen in each segment, as many as its `choices`.

        It is counted as one of `kind`. `on_layer(layer)` is called, on this thread, when the step's
        KV of a layer is in the cache.
        """
        begun = time.perf_counter()
        logits = self._model.forward(segments, on_layer)
        params, positions = [], []
        for segment in segments:
            params += [segment.sampling] * segment.choices
            positions += range(segment.stop - segment.choices + 1, segment.stop + 1)
        chosen = iter(choose(logits, params, positions)) if params else iter(())
        token_ids = [list(islice(chosen, segment.choices)) for segment in segments]
        dtypes = dtype_name(self.cache.dtype), dtype_name(self.cache.stored)
        work = step_work(self.spec, dtypes[0], segments, dtypes[1], self._quantize)
        self.meter.add(kind, work, time.perf_counter() - begun)
        return token_ids

    @torch.inference_mode()
    def logits(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Compute a step without choosing: float32 [choices of all segments, vocabulary]."""
        return self._model.forward(segments)

    def warm_up(self) -> None:
        """One small real prefill and decode step, on blocks that nobody owns yet; and the limits.

        What follows is counted from zero, with a bound for each step.
        """
        block_table = tuple(range(blocks_for(2, self.cache.block_size)))
        [[token_id]] = self.step([Segment((0,), 0, block_table, 1)], kind=Kind.PREFILL)
        if len(block_table) <= self.cache.blocks:
            self.step([Segment((token_id,), 1, block_table, 1)])
        self.meter.reset()
        self.meter.limits = measure_limits(self.cache.dtype, self.cache.device)
