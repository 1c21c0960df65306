"""One process answering: stops where it must, and the same however the prompt is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.errors import InvalidRequest
from baton.sampling import FinishReason, SamplingParams, StopParams
from engine.block_pool import NotEnoughBlocks
from engine.generate import generate
from engine.runner import DecodeRow, PrefillChunk, Runner
from tests.engine.tiny import dense_logits, poison, tiny_runner, tiny_weights

GREEDY = SamplingParams()
PROMPT = (1, 44, 7, 90, 13, 62)
SAMPLED = SamplingParams(temperature=1.0, top_k=20, seed=11)


@pytest.fixture
def runner(tiny_folder: Path) -> Runner:
    runner = tiny_runner(tiny_folder)
    poison(runner.cache)
    return runner


def test_greedy_tokens_are_those_of_the_dense_reference(runner: Runner) -> None:
    answer = generate(runner, PROMPT, GREEDY, StopParams(12, ignore_eos=True))
    token_ids = list(PROMPT)
    for _ in range(12):
        token_ids.append(int(dense_logits(tiny_weights(), token_ids)[-1].argmax()))
    assert answer.token_ids == tuple(token_ids[len(PROMPT) :])
    assert answer.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 6, 7])
def test_the_chunk_size_changes_nothing(
    runner: Runner, sampling: SamplingParams, chunk_tokens: int
) -> None:
    stop = StopParams(10, ignore_eos=True)
    whole = generate(runner, PROMPT, sampling, stop)
    assert generate(runner, PROMPT, sampling, stop, chunk_tokens=chunk_tokens) == whole


@pytest.mark.parametrize("place", [0, 3])
def test_an_end_token_ends_the_answer_and_is_no_part_of_it(runner: Runner, place: int) -> None:
    free = generate(runner, PROMPT, SAMPLED, StopParams(8, ignore_eos=True))
    end = free.token_ids[place]
    before_it = free.token_ids[: free.token_ids.index(end)]
    answer = generate(runner, PROMPT, SAMPLED, StopParams(8), (end,))
    assert (answer.token_ids, answer.finish_reason) == (before_it, FinishReason.STOP)
    ignoring = generate(runner, PROMPT, SAMPLED, StopParams(8, ignore_eos=True), (end,))
    assert ignoring == free


def test_an_answer_sampled_anew_from_its_middle_goes_on_identically(runner: Runner) -> None:
    """A token's random number belongs to its place in the sequence, wherever the prompt ends."""
    whole = generate(runner, PROMPT, SAMPLED, StopParams(8, ignore_eos=True)).token_ids
    for done in range(1, 8):
        rest = generate(
            runner, PROMPT + whole[:done], SAMPLED, StopParams(8 - done, ignore_eos=True)
        )
        assert rest.token_ids == whole[done:]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [((), 4, "prompt is empty"), ((1,), 0, "max_tokens is 0"), ((1,) * 100, 30, "context of 128")],
)
def test_what_cannot_be_answered_is_refused(
    runner: Runner, prompt: tuple[int, ...], max_tokens: int, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        generate(runner, prompt, GREEDY, StopParams(max_tokens))


def test_the_whole_context_can_be_used_and_no_more(tiny_folder: Path) -> None:
    """As many tokens as the model has places, the last of which needs no KV."""
    runner = tiny_runner(tiny_folder, blocks=32)
    stop = StopParams(8, ignore_eos=True)
    assert len(generate(runner, (1,) * 120, GREEDY, stop).token_ids) == 8
    with pytest.raises(InvalidRequest):
        generate(runner, (1,) * 121, GREEDY, stop)


def test_a_cache_that_is_too_small_says_so(tiny_folder: Path) -> None:
    with pytest.raises(NotEnoughBlocks):
        generate(tiny_runner(tiny_folder, blocks=2), PROMPT, GREEDY, StopParams(4))


def test_only_the_last_chunk_gives_a_token(runner: Runner) -> None:
    assert runner.prefill(PrefillChunk(PROMPT[:4], 0, (0, 1), None)) is None
    assert isinstance(runner.prefill(PrefillChunk(PROMPT[4:], 4, (0, 1), GREEDY)), int)


def test_a_mixed_step_gives_each_row_what_it_would_get_alone(runner: Runner) -> None:
    for table in ((0, 1), (2, 3)):
        runner.prefill(PrefillChunk(PROMPT, 0, table, None))
    rows = [DecodeRow(50, 6, (0, 1), GREEDY), DecodeRow(51, 6, (2, 3), SAMPLED)]
    assert runner.decode(rows) == [runner.decode([row])[0] for row in rows]
    assert runner.decode([]) == []


@pytest.mark.parametrize(("blocks", "block_size"), [(1, 1), (2, 1), (1, 16)])
def test_warm_up_needs_no_more_than_the_cache_has(
    tiny_folder: Path, blocks: int, block_size: int
) -> None:
    tiny_runner(tiny_folder, blocks, block_size).warm_up()
