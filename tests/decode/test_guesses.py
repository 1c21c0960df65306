"""Guesses: found where the text repeats itself, as many as it pays to try, and never believed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from decode.guesses import (
    LONGEST_NGRAM,
    SHORTEST_NGRAM,
    Pace,
    PromptLookup,
    right_guesses,
)

TOKENS = st.lists(st.integers(0, 2), max_size=40)


def searched(known: list[int], most: int) -> tuple[int, ...]:
    """The same, by looking through the whole text anew."""
    for length in range(min(LONGEST_NGRAM, len(known)), SHORTEST_NGRAM - 1, -1):
        run = known[len(known) - length :]
        for end in range(len(known) - 1, length - 1, -1):
            if known[end - length : end] == run:
                return tuple(known[end : end + most])
    return ()


@given(TOKENS, st.lists(st.integers(0, 5), max_size=12), st.integers(1, 6))
def test_what_followed_the_last_such_run_is_guessed(
    tokens: list[int], cuts: list[int], most: int
) -> None:
    """However the text comes in, and whether it was asked on the way."""
    lookup = PromptLookup()
    begin = 0
    for cut in [*cuts, len(tokens)]:
        lookup.extend(tokens[begin : begin + cut])
        begin += cut
        assert lookup.guess(most) == searched(lookup.token_ids, most)


def test_nothing_is_guessed_where_nothing_repeats() -> None:
    lookup = PromptLookup()
    lookup.extend(range(50))
    assert lookup.guess(4) == ()


@given(TOKENS, TOKENS)
def test_guesses_are_right_up_to_the_first_that_differs(one: list[int], other: list[int]) -> None:
    right = right_guesses(one, other)
    assert one[:right] == other[:right]
    assert right == min(len(one), len(other)) or one[right] != other[right]


def test_who_guesses_well_guesses_further_and_who_does_not_stops() -> None:
    good, bad = Pace(), Pace()
    first = good.length(8)
    for _ in range(20):
        good.learn(good.length(8), 8)
        bad.learn(bad.length(8), 0)
    assert good.length(8) == 8 > first > 0
    lengths = [bad.length(8) for _ in range(40)]
    assert set(lengths) == {0, 1}
    assert lengths.count(1) == 2, "now and then it is given another chance"


def test_what_follows_on_a_wrong_guess_is_not_held_against_it() -> None:
    long, short = Pace(), Pace()
    long.learn(8, 1)
    short.learn(2, 1)
    assert long.rate == short.rate


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=60), st.integers(0, 8))
def test_a_pace_stays_within_its_limits(history: list[tuple[int, int]], most: int) -> None:
    pace = Pace()
    for tried, right in history:
        pace.learn(tried, min(tried, right))
        assert 0.0 <= pace.rate <= 1.0
        assert 0 <= pace.length(most) <= most
