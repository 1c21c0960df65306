"""Attention of one step's tokens over the paged cache, as torch computes it.

What is the same in every layer (slots, contexts, masks) is worked out once for a step. Segments of
few tokens are padded into one batch, with no loop over sequences in a layer; each longer one, a
chunk of a prompt, goes through flash attention by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baton.model.spec import ModelSpec
from engine.kv_cache import PagedKvCache
from engine.native.attention import NativeStepAttention, serves_cache
from engine.operations import batch_attention, chunk_attention
from engine.segments import Segment

NARROW_TOKENS = 16
"""Segments of up to so many tokens share a batch: an answer's next token, and guesses behind it."""


def step_attention(
    spec: ModelSpec, cache: PagedKvCache, segments: Sequence[Segment]
) -> StepAttention | NativeStepAttention:
    """The attention of one step, by what serves this cache best."""
    kind = NativeStepAttention if serves_cache(cache) else StepAttention
    return kind(spec, cache, segments)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One longer segment: where its queries stand in the step, and where its tokens lie."""

    begin: int
    end: int
    segment: Segment
    slots: torch.Tensor  # int64 [stop]: of all the sequence's tokens


@dataclass(frozen=True, slots=True)
class _Batch:
    """The segments of few tokens. `rows` is None where they are the whole step, a token each."""

    rows: torch.Tensor | None  # int64 [segments, most]: the queries' places in the step
    last: torch.Tensor  # int64 [segments]: position of each segment's last token
    places: torch.Tensor  # int64 [segments, most]: positions of the queries
    own: torch.Tensor | None  # int64 [tokens]: which of rows.flatten() are no padding
    begins: torch.Tensor | None  # int64 [tokens]: their places in the step
    tables: torch.Tensor  # int64 [segments, blocks]: padded with zeros


class StepAttention:
    """The attention of one step. Build it, then call `attend` for one layer after another."""

    def __init__(self, spec: ModelSpec, cache: PagedKvCache, segments: Sequence[Segment]) -> None:
        self._spec = spec
        self._cache = cache
        self._windows = {spec.window_of(layer) for layer in range(spec.layers)}
        self._tokens = sum(len(segment.token_ids) for segment in segments)
        narrow: list[tuple[int, Segment]] = []
        self._chunks: list[_Chunk] = []
        begin = 0
        for segment in segments:
            end = begin + len(segment.token_ids)
            if end - begin <= NARROW_TOKENS:
                narrow.append((begin, segment))
            else:
                slots = cache.slots_of(segment.block_table, 0, segment.stop)
                self._chunks.append(_Chunk(begin, end, segment, slots))
            begin = end
        self._batch = self._make_batch(narrow) if narrow else None
        self._contexts = {
            window: self._padded_context(self._batch, window)
            for window in self._windows
            if self._batch is not None
        }
        self._masks = {
            (chunk.begin, window): _chunk_context(chunk.segment, window, cache.device)
            for chunk in self._chunks
            for window in self._windows
        }

    def attend(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """What the queries, [tokens, query_heads, head_dim], see: [tokens, heads * head_dim].

        The step's own keys and values are in the cache by now.
        """
        window = self._spec.window_of(layer)
        if self._batch is not None and self._batch.rows is None:
            return self._attend_batch(layer, queries, self._batch, window)
        if self._batch is None and len(self._chunks) == 1:
            return self._attend_chunk(layer, queries, self._chunks[0], window)
        out = queries.new_empty((self._tokens, queries.shape[1] * queries.shape[2]))
        for chunk in self._chunks:
            part = queries[chunk.begin : chunk.end]
            out[chunk.begin : chunk.end] = self._attend_chunk(layer, part, chunk, window)
        if self._batch is not None:
            assert self._batch.begins is not None
            answers = self._attend_batch(layer, queries, self._batch, window)
            out.index_copy_(0, self._batch.begins, answers)
        return out

    def _attend_chunk(
        self, layer: int, queries: torch.Tensor, chunk: _Chunk, window: int | None
    ) -> torch.Tensor:
        first, mask = self._masks[chunk.begin, window]
        keys, values = self._cache.read(layer, chunk.slots[first:])
        return chunk_attention(queries, keys, values, mask)

    def _attend_batch(
        self, layer: int, queries: torch.Tensor, batch: _Batch, window: int | None
    ) -> torch.Tensor:
        """[tokens of the batch, heads * head_dim], in the order of `begins`."""
        context, mask = self._contexts[window]
        keys, values = self._cache.read(layer, context)
        if batch.rows is None:
            return batch_attention(queries[:, None], keys, values, mask)[:, 0]
        padded = batch_attention(queries[batch.rows], keys, values, mask)  # [segments, most, …]
        assert batch.own is not None
        return padded.flatten(0, 1)[batch.own]

    def _make_batch(self, narrow: Sequence[tuple[int, Segment]]) -> _Batch:
        device, size = self._cache.device, self._cache.block_size
        lengths = [len(segment.token_ids) for _, segment in narrow]
        last = torch.tensor([segment.stop - 1 for _, segment in narrow])
        starts = torch.tensor([segment.start for _, segment in narrow])
        most = max(lengths)
        tables = torch.zeros((len(narrow), int(last.max()) // size + 1), dtype=torch.int64)
        for row, (_, segment) in enumerate(narrow):
            used = segment.block_table[: (segment.stop - 1) // size + 1]
            tables[row, : len(used)] = torch.tensor(used)
        # Padding repeats a segment's last query.
        steps = torch.arange(most)[None, :]  # [1, most]
        counts = torch.tensor(lengths)[:, None]
        steps = torch.minimum(steps, counts - 1)  # [segments, most]
        places = starts[:, None] + steps
        if most == 1 and self._tokens == len(narrow):
            return _Batch(None, last, places, None, None, tables)
        begins = torch.tensor([begin for begin, _ in narrow])[:, None]
        rows = begins + steps
        own = (torch.arange(most)[None, :] < counts).flatten().nonzero()[:, 0]
        return _Batch(
            rows.to(device), last, places, own.to(device), rows.flatten()[own].to(device), tables
        )

    def _padded_context(
        self, batch: _Batch, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of the tokens each segment sees, and which of those each of its queries does.

        Returns int64 [segments, longest] and bool [segments, most, longest]. Padding repeats the
        segment's last slot: what lies in a block of another owner, or none, must not be read even
        under a mask.
        """
        size = self._cache.block_size
        longest = int(batch.last.max()) + 1
        first = torch.zeros_like(batch.last)
        if window is not None:
            first = (batch.places[:, 0] - window + 1).clamp(min=0)
            longest = int((batch.last - first).max()) + 1
        tokens = first[:, None] + torch.arange(longest)  # [segments, longest]
        own = torch.minimum(tokens, batch.last[:, None])
        slots = batch.tables.gather(1, own // size) * size + own % size
        mask = tokens[:, None, :] <= batch.places[:, :, None]
        if window is not None:
            mask = mask & (tokens[:, None, :] > batch.places[:, :, None] - window)
        return slots.to(self._cache.device), mask.to(self._cache.device)


def _chunk_context(
    segment: Segment, window: int | None, device: torch.device
) -> tuple[int, torch.Tensor | None]:
    """The first token that any of a chunk's tokens sees, and which of those from there on each.

    The mask is bool [stop - start, stop - first], or None where all that matters is order.
    """
    start, stop = segment.start, segment.stop
    if start == 0 and (window is None or stop <= window):
        return 0, None
    first = 0 if window is None else max(0, start - window + 1)
    queries = torch.arange(start, stop, device=device)[:, None]
    keys = torch.arange(first, stop, device=device)[None, :]
    mask = keys <= queries
    return first, mask if window is None else mask & (keys > queries - window)
