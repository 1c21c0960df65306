"""One process doing it all: the reference that the disaggregated answer must equal (P3)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from baton.errors import InvalidRequest
from baton.sampling import FinishReason, SamplingParams, StopParams
from engine.accounting import Kind
from engine.block_pool import BlockPool, blocks_for
from engine.runner import Runner
from engine.segments import Segment


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
    eos_token_ids: Collection[int] | None = None,
    chunk_tokens: int = 256,
) -> Answer:
    """Answer one prompt, with the runner's whole cache for it alone.

    `eos_token_ids` are the model's own where none are given. Raises `InvalidRequest` for a prompt
    or an answer that the model cannot hold, `NotEnoughBlocks` where the cache cannot.
    """
    prompt = tuple(prompt_token_ids)
    kv_tokens = len(prompt) + stop.max_tokens - 1  # the last token's KV is never needed
    _check(runner, prompt, stop, kv_tokens, chunk_tokens)
    ends = runner.spec.eos_token_ids if eos_token_ids is None else eos_token_ids
    pool = BlockPool(runner.cache.blocks)
    block_table = pool.lease("answer", blocks_for(kv_tokens, runner.cache.block_size), float("inf"))
    try:
        token_id = _prefill(runner, prompt, block_table, sampling, chunk_tokens)
        answer: list[int] = []
        while stop.ignore_eos or token_id not in ends:
            answer.append(token_id)
            if len(answer) == stop.max_tokens:
                return Answer(tuple(answer), FinishReason.LENGTH)
            position = len(prompt) + len(answer) - 1
            [[token_id]] = runner.step([Segment((token_id,), position, block_table, 1, sampling)])
        return Answer(tuple(answer), FinishReason.STOP)
    finally:
        pool.release("answer")


def _check(
    runner: Runner, prompt: tuple[int, ...], stop: StopParams, kv_tokens: int, chunk_tokens: int
) -> None:
    assert chunk_tokens > 0, "a chunk has at least one token"
    if not prompt:
        raise InvalidRequest("the prompt is empty; send at least one token")
    if stop.max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {stop.max_tokens}; send 1 or more")
    if kv_tokens >= runner.spec.context_length:
        raise InvalidRequest(
            f"{len(prompt)} prompt tokens and {stop.max_tokens} more exceed the model's context of "
            f"{runner.spec.context_length}; shorten the prompt or lower max_tokens"
        )


def _prefill(
    runner: Runner,
    prompt: tuple[int, ...],
    block_table: tuple[int, ...],
    sampling: SamplingParams,
    chunk_tokens: int,
) -> int:
    """Compute the prompt chunk by chunk; return the answer's first token."""
    for start in range(0, len(prompt), chunk_tokens):
        token_ids = prompt[start : start + chunk_tokens]
        last = start + chunk_tokens >= len(prompt)
        chunk = Segment(token_ids, start, block_table, int(last), sampling)
        [chosen] = runner.step([chunk], kind=Kind.PREFILL)
    return chosen[0]
