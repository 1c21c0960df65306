"""The forward pass over a paged KV cache: a chunk of one prompt, or one token of many sequences.

One pass serves every family: what a layer has (biases, head norms, experts) its weights say, and
what it sees (rotary positions or none, a window or all) the spec.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from baton.model.spec import ModelSpec
from engine.kv_cache import PagedKvCache
from engine.linear import Linear
from engine.operations import (
    decode_attention,
    mixture,
    prefill_attention,
    rms_norm,
    rotary_table,
    rotate,
    silu_mul,
)
from engine.weights import LayerWeights, ModelWeights

Attend = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer, ready to compute."""

    input_norm: torch.Tensor
    qkv: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear
    post_norm: torch.Tensor
    feed_forward: Callable[[torch.Tensor], torch.Tensor]  # [tokens, hidden] to the same


def _ready(layer: LayerWeights, spec: ModelSpec) -> _Layer:
    return _Layer(
        layer.input_norm,
        Linear(layer.qkv, layer.qkv_bias),
        layer.query_norm,
        layer.key_norm,
        Linear(layer.output, layer.output_bias),
        layer.post_norm,
        _feed_forward(layer, spec),
    )


def _feed_forward(layer: LayerWeights, spec: ModelSpec) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's one network, or its experts."""
    if layer.router is not None and spec.experts is not None:
        return partial(
            mixture,
            router=layer.router,
            gate_up=layer.gate_up,
            down=layer.down,
            per_token=spec.experts.per_token,
            normalised=spec.experts.normalised,
        )
    gate_up, down = Linear(layer.gate_up), Linear(layer.down)
    return lambda normed: down(silu_mul(gate_up(normed)))


class Llama:
    """A model's weights and the cache they compute over. Not thread-safe: one step at a time.

    Takes the layers out of `weights`, so that none is held twice while it is made ready.
    """

    def __init__(self, spec: ModelSpec, weights: ModelWeights, cache: PagedKvCache) -> None:
        self._spec = spec
        self._cache = cache
        self._embedding = weights.embedding
        self._layers = tuple(_ready(weights.layers.pop(0), spec) for _ in range(spec.layers))
        self._norm = weights.norm
        self._head = Linear(weights.head)
        self._windows = {spec.window_of(layer) for layer in range(spec.layers)}
        scaling, theta = spec.rope_scaling, spec.rope_theta
        divisors = None if scaling is None else scaling.divisors(spec.head_dim, theta)
        self._cosines, self._sines = rotary_table(
            spec.head_dim, spec.context_length, theta, cache.device, divisors
        )

    def prefill(
        self,
        token_ids: Sequence[int],
        start: int,
        block_table: Sequence[int],
        on_layer: Callable[[int], None] | None,
    ) -> torch.Tensor:
        """Compute a prompt's tokens from `start` on; the earlier ones are in the cache.

        Calls `on_layer(layer)` once the chunk's KV of that layer is in the cache. Returns the
        float32 logits of the chunk's last token, [vocabulary].
        """
        stop = start + len(token_ids)
        slots = self._cache.slots_of(block_table, 0, stop)
        seen = {window: self._chunk_context(start, stop, window) for window in self._windows}

        def attend(layer: int, queries: torch.Tensor) -> torch.Tensor:
            first, mask = seen[self._spec.window_of(layer)]
            keys, values = self._cache.read(layer, slots[first:])
            return prefill_attention(queries, keys, values, mask)

        positions = torch.arange(start, stop, device=self._cache.device)
        hidden = self._run_layers(token_ids, positions, slots[start:], attend, on_layer)
        return self._logits(hidden[-1:])[0]

    def decode(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        block_tables: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        """Feed one token of each sequence at its position; return float32 logits [rows, vocab]."""
        device = self._cache.device
        places = torch.tensor(positions)  # [rows]
        tables = self._padded_tables(places, block_tables)
        seen = {window: self._padded_context(places, tables, window) for window in self._windows}
        size = self._cache.block_size
        own_blocks = tables.gather(1, places[:, None] // size)[:, 0]
        slots = (own_blocks * size + places % size).to(device)  # [rows]: each row's own place

        def attend(layer: int, queries: torch.Tensor) -> torch.Tensor:
            context, mask = seen[self._spec.window_of(layer)]
            keys, values = self._cache.read(layer, context)
            return decode_attention(queries, keys, values, mask)

        hidden = self._run_layers(token_ids, places.to(device), slots, attend, None)
        return self._logits(hidden)

    def _chunk_context(
        self, start: int, stop: int, window: int | None
    ) -> tuple[int, torch.Tensor | None]:
        """The first token that any of a chunk's tokens sees, and which of those from there on each.

        The mask is bool [stop - start, stop - first], or None where all that matters is order.
        """
        if start == 0 and (window is None or stop <= window):
            return 0, None
        first = 0 if window is None else max(0, start - window + 1)
        queries = torch.arange(start, stop, device=self._cache.device)[:, None]
        keys = torch.arange(first, stop, device=self._cache.device)[None, :]
        mask = keys <= queries
        return first, mask if window is None else mask & (keys > queries - window)

    def _padded_tables(
        self, places: torch.Tensor, block_tables: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """The blocks of each row up to its place, int64 [rows, most]; padded with zeros."""
        size = self._cache.block_size
        tables = torch.zeros((len(places), int(places.max()) // size + 1), dtype=torch.int64)
        for row, (table, place) in enumerate(zip(block_tables, places.tolist(), strict=True)):
            used = table[: place // size + 1]
            tables[row, : len(used)] = torch.tensor(used)
        return tables

    def _padded_context(
        self, places: torch.Tensor, tables: torch.Tensor, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of the tokens each row sees, its place the last, and which are no padding.

        Takes int64 [rows], returns int64 [rows, longest] and bool [rows, 1, 1, longest]. Padding
        repeats the row's last slot: what lies in a block of another owner, or none, must not be
        read even under a mask.
        """
        size = self._cache.block_size
        longest = int(places.max()) + 1
        first = torch.zeros_like(places)  # [rows]
        if window is not None:
            longest = min(longest, window)
            first = (places - window + 1).clamp(min=0)
        tokens = first[:, None] + torch.arange(longest)
        own = torch.minimum(tokens, places[:, None])  # [rows, longest]
        slots = tables.gather(1, own // size) * size + own % size
        mask = (tokens <= places[:, None])[:, None, None, :]
        return slots.to(self._cache.device), mask.to(self._cache.device)

    def _run_layers(
        self,
        token_ids: Sequence[int],
        positions: torch.Tensor,
        slots: torch.Tensor,
        attend: Attend,
        on_layer: Callable[[int], None] | None,
    ) -> torch.Tensor:
        """Run every layer over [tokens]; write their KV to `slots`; return [tokens, hidden]."""
        cosines = self._cosines[positions].to(self._cache.dtype)
        sines = self._sines[positions].to(self._cache.dtype)  # each [tokens, head_dim]
        ids = torch.tensor(token_ids, device=self._cache.device)
        hidden = F.embedding(ids, self._embedding)
        for number, layer in enumerate(self._layers):
            queries = self._project(number, layer, hidden, cosines, sines, slots)
            if on_layer is not None:
                on_layer(number)
            hidden = hidden + layer.output(attend(number, queries))
            normed = rms_norm(hidden, layer.post_norm, self._spec.rms_norm_eps)
            hidden = hidden + layer.feed_forward(normed)
        return hidden

    def _project(
        self,
        number: int,
        layer: _Layer,
        hidden: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Queries [tokens, query_heads, head_dim], as they attend; KV goes to the cache."""
        spec = self._spec
        normed = rms_norm(hidden, layer.input_norm, spec.rms_norm_eps)
        packed = layer.qkv(normed).view(len(hidden), -1, spec.head_dim)
        turning, values = packed.split((spec.query_heads + spec.kv_heads, spec.kv_heads), dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = turning.split((spec.query_heads, spec.kv_heads), dim=1)
            queries = rms_norm(queries, layer.query_norm, spec.rms_norm_eps)
            keys = rms_norm(keys, layer.key_norm, spec.rms_norm_eps)
            turning = torch.cat((queries, keys), dim=1)
        if number not in spec.layers_without_rope:
            turning = rotate(turning, cosines, sines)  # queries and keys at once
        queries, keys = turning.split((spec.query_heads, spec.kv_heads), dim=1)
        self._cache.write(number, slots, keys, values)
        return queries

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = rms_norm(hidden, self._norm, self._spec.rms_norm_eps)
        return self._head(normed).float()
