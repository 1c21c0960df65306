"""One process answering: stops where it must, and the same however the prompt is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.errors import InvalidRequest
from baton.sampling import FinishReason, SamplingParams, StopParams
from engine.block_pool import NotEnoughBlocks
from engine.generate import generate
from engine.runner import Runner
from engine.segments import Segment
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
    assert runner.step([Segment(PROMPT[:4], 0, (0, 1))]) == [[]]
    [[token_id]] = runner.step([Segment(PROMPT[4:], 4, (0, 1), 1)])
    assert token_id == generate(runner, PROMPT, GREEDY, StopParams(1)).token_ids[0]


def test_a_mixed_step_gives_each_segment_what_it_would_get_alone(runner: Runner) -> None:
    """A long chunk, a short one, one answer's next token, and another's with guesses behind it."""
    for table in ((0, 1), (2, 3)):
        runner.step([Segment(PROMPT, 0, table)])
    long = tuple((number * 7 + 3) % 97 for number in range(40))
    segments = [
        Segment((50,), 6, (0, 1), 1),
        Segment(long, 0, tuple(range(4, 14)), 1, SAMPLED),
        Segment((51, 60, 61), 6, (2, 3, 14), 3, SAMPLED),
        Segment(PROMPT[:5], 0, (16, 15)),
    ]
    alone = [runner.step([segment])[0] for segment in segments]
    assert [len(token_ids) for token_ids in alone] == [1, 1, 3, 0]
    assert runner.step(segments) == alone
    assert runner.step(segments[::-1]) == alone[::-1]


def test_guesses_are_answered_as_if_they_had_come_one_by_one(runner: Runner) -> None:
    runner.step([Segment(PROMPT, 0, (0, 1, 2))])
    guesses = (51, 60, 61, 7)
    one_by_one = [
        runner.step([Segment((token_id,), 6 + number, (0, 1, 2), 1, SAMPLED)])[0][0]
        for number, token_id in enumerate(guesses)
    ]
    assert runner.step([Segment(guesses, 6, (0, 1, 2), 4, SAMPLED)]) == [one_by_one]


@pytest.mark.parametrize(("blocks", "block_size"), [(1, 1), (2, 1), (1, 16)])
def test_warm_up_needs_no_more_than_the_cache_has(
    tiny_folder: Path, blocks: int, block_size: int
) -> None:
    tiny_runner(tiny_folder, blocks, block_size).warm_up()
