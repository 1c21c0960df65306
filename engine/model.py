"""The forward pass of a Llama over a paged KV cache: chunks of one prompt, or one token of many."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from baton.model.spec import ModelSpec
from engine.kv_cache import PagedKvCache
from engine.operations import (
    decode_attention,
    prefill_attention,
    rms_norm,
    rotary_table,
    rotate,
    silu_mul,
)
from engine.weights import LayerWeights, ModelWeights

Attend = Callable[[int, torch.Tensor], torch.Tensor]


class Llama:
    """A model's weights and the cache they compute over. Not thread-safe: one step at a time."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, cache: PagedKvCache) -> None:
        self._spec = spec
        self._weights = weights
        self._cache = cache
        self._cosines, self._sines = rotary_table(
            spec.head_dim, spec.context_length, spec.rope_theta, cache.device
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
        positions = torch.arange(start, stop, device=self._cache.device)
        context = self._cache.slots_of(block_table, 0, stop)
        mask = None
        if start:
            mask = torch.arange(stop, device=self._cache.device)[None, :] <= positions[:, None]

        def attend(layer: int, queries: torch.Tensor) -> torch.Tensor:
            keys, values = self._cache.read(layer, context)
            return prefill_attention(queries, keys, values, mask)

        hidden = self._layers(token_ids, positions, context[start:], attend, on_layer)
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
        context, mask = self._padded_context(places, block_tables)
        slots = context[:, -1].to(device)  # where the padding repeats, and so each row's own place
        context, mask = context.to(device), mask[:, None, None, :].to(device)

        def attend(layer: int, queries: torch.Tensor) -> torch.Tensor:
            keys, values = self._cache.read(layer, context)
            return decode_attention(queries, keys, values, mask)

        hidden = self._layers(token_ids, places.to(device), slots, attend, None)
        return self._logits(hidden)

    def _padded_context(
        self, places: torch.Tensor, block_tables: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of each row's tokens up to its place, and which are no padding.

        Takes int64 [rows], returns int64 and bool [rows, longest]. Padding repeats the row's last
        slot: what lies in a block of another owner, or none, must not be read even under a mask.
        """
        size = self._cache.block_size
        tokens = torch.arange(int(places.max()) + 1)
        own = torch.minimum(tokens, places[:, None])  # [rows, longest]
        tables = torch.zeros((len(places), len(tokens) // size + 1), dtype=torch.int64)
        for row, (table, place) in enumerate(zip(block_tables, places.tolist(), strict=True)):
            used = table[: place // size + 1]
            tables[row, : len(used)] = torch.tensor(used)
        slots = tables.gather(1, own // size) * size + own % size
        return slots, tokens <= places[:, None]

    def _layers(
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
        hidden = F.embedding(ids, self._weights.embedding)
        for number, layer in enumerate(self._weights.layers):
            queries = self._project(number, layer, hidden, cosines, sines, slots)
            if on_layer is not None:
                on_layer(number)
            hidden = hidden + F.linear(attend(number, queries), layer.output)
            normed = rms_norm(hidden, layer.post_norm, self._spec.rms_norm_eps)
            hidden = hidden + F.linear(silu_mul(F.linear(normed, layer.gate_up)), layer.down)
        return hidden

    def _project(
        self,
        number: int,
        layer: LayerWeights,
        hidden: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Queries [tokens, query_heads, head_dim], rotated; keys and values go to the cache."""
        spec = self._spec
        normed = rms_norm(hidden, layer.input_norm, spec.rms_norm_eps)
        packed = F.linear(normed, layer.qkv).view(len(hidden), -1, spec.head_dim)
        heads = packed.split((spec.query_heads, spec.kv_heads, spec.kv_heads), dim=1)
        queries, keys = rotate(heads[0], cosines, sines), rotate(heads[1], cosines, sines)
        self._cache.write(number, slots, keys, heads[2])
        return queries

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = rms_norm(hidden, self._weights.norm, self._spec.rms_norm_eps)
        return F.linear(normed, self._weights.head).float()
