"""One process doing it all: the reference that the disaggregated answer must equal (P3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.sampling import FinishReason, SamplingParams, StopParams
from engine.block_pool import blocks_for
from engine.runner import DecodeRow, PrefillChunk, Runner


@dataclass(frozen=True, slots=True)
class Answer:
    """An end-of-sequence token ends the answer and is not part of it."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def generate(
    runner: Runner,
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    stop: StopParams,
    chunk_tokens: int = 256,
) -> Answer:
    """Answer one prompt, using the runner's cache from its first block on."""
    prompt = tuple(prompt_token_ids)
    kv_tokens = len(prompt) + stop.max_tokens - 1
    block_table = tuple(range(blocks_for(kv_tokens, runner.cache.block_size)))
    token_id: int | None = None
    for start in range(0, len(prompt), chunk_tokens):
        token_ids = prompt[start : start + chunk_tokens]
        last = start + chunk_tokens >= len(prompt)
        chunk = PrefillChunk(token_ids, start, block_table, sampling if last else None)
        token_id = runner.prefill(chunk)
    answer: list[int] = []
    while True:
        assert token_id is not None, "the last chunk gives a token"
        if token_id in runner.spec.eos_token_ids and not stop.ignore_eos:
            return Answer(tuple(answer), FinishReason.STOP)
        answer.append(token_id)
        if len(answer) == stop.max_tokens:
            return Answer(tuple(answer), FinishReason.LENGTH)
        row = DecodeRow(token_id, len(prompt) + len(answer) - 1, block_table, sampling)
        [token_id] = runner.decode([row])
