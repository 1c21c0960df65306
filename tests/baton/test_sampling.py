"""Sampling: what is refused, and a random number that only (seed, position) decides."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from baton.errors import InvalidRequest
from baton.sampling import MAX_SEED, SamplingParams, philox4x32, uniform, validate_sampling

SEEDS = st.integers(0, MAX_SEED)
POSITIONS = st.integers(0, (1 << 64) - 1)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    """The known answers of Random123, the library of Philox's authors (`kat_vectors`)."""
    assert philox4x32(counter, key) == words


@given(SEEDS, POSITIONS)
def test_a_random_number_lies_in_the_unit_interval(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0


@given(SEEDS, POSITIONS)
def test_a_random_number_is_the_same_every_time(seed: int, position: int) -> None:
    assert uniform(seed, position) == uniform(seed, position)


@given(SEEDS, SEEDS, POSITIONS)
def test_another_seed_gives_another_number(seed: int, other: int, position: int) -> None:
    """Philox is a bijection cut down to 53 bits: a collision among these examples is a mistake."""
    assume(seed != other)
    assert uniform(seed, position) != uniform(other, position)


@given(SEEDS, POSITIONS, POSITIONS)
def test_another_position_gives_another_number(seed: int, position: int, other: int) -> None:
    assume(position != other)
    assert uniform(seed, position) != uniform(seed, other)


def test_random_numbers_of_one_answer_are_spread_evenly() -> None:
    """Chi-square over 16 bins at the 0.1 % level, with a fixed seed: it passes always or never."""
    draws, bins = 4096, [0] * 16
    for position in range(draws):
        bins[int(uniform(7, position) * 16)] += 1
    wanted = draws / 16
    assert sum((count - wanted) ** 2 / wanted for count in bins) < 37.70


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=100.0, top_k=1 << 30, top_p=1.0, min_p=1.0, seed=MAX_SEED),
        SamplingParams(temperature=5e-324, top_p=5e-324),
    ],
    ids=["defaults", "greatest", "least"],
)
def test_values_at_the_limits_are_taken_as_they_are(params: SamplingParams) -> None:
    assert validate_sampling(params) is params


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 100.5),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", (1 << 30) + 1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_p", -math.inf),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", math.nan),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
    ],
)
def test_a_value_out_of_range_is_refused_by_name_with_what_to_send(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name} is {value}; send .+"):
        validate_sampling(replace(SamplingParams(), **{name: value}))


def test_only_temperature_zero_is_greedy() -> None:
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=5e-324).greedy
