"""From logits to tokens: the right distribution, and nothing but (seed, position) decides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.sampling import SamplingParams, uniform
from engine import sampler
from engine.sampler import choose

LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.25, -3.0, 1.5, 0.0, 2.0])
DRAWS = 4000

sampling = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 10),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    seed=st.integers(0, (1 << 64) - 1),
)
rows_of_logits = st.lists(
    st.lists(st.floats(-20, 20, width=32), min_size=9, max_size=9), min_size=1, max_size=5
)


def expected(params: SamplingParams) -> dict[int, float]:
    """The wanted distribution over LOGITS, by plain arithmetic: token id to probability."""
    weights = {i: math.exp(x / params.temperature) for i, x in enumerate(LOGITS.tolist())}
    if params.top_k:
        least = sorted(weights.values(), reverse=True)[min(params.top_k, len(weights)) - 1]
        weights = {i: w for i, w in weights.items() if w >= least}
    total, mass, kept = sum(weights.values()), 0.0, {}
    for token_id in sorted(weights, key=lambda i: (-weights[i], i)):
        if mass >= params.top_p:
            break
        kept[token_id] = weights[token_id]
        mass += weights[token_id] / total
    best = max(kept.values())
    kept = {i: w for i, w in kept.items() if w >= params.min_p * best}
    return {i: w / sum(kept.values()) for i, w in sorted(kept.items())}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.5, seed=2),
        SamplingParams(temperature=2.0, top_k=3, seed=3),
        SamplingParams(temperature=1.0, top_p=0.7, seed=4),
        SamplingParams(temperature=1.5, min_p=0.3, seed=5),
        SamplingParams(temperature=1.2, top_k=6, top_p=0.9, min_p=0.1, seed=6),
    ],
    ids=str,
)
def test_tokens_follow_the_distribution(params: SamplingParams) -> None:
    """Chi-square at the 0.1 % level; the seeds are fixed, so it passes always or never."""
    drawn = choose(LOGITS.expand(DRAWS, -1), [params] * DRAWS, range(DRAWS))
    wanted = expected(params)
    assert set(drawn) <= set(wanted)
    statistic = sum(
        (drawn.count(i) - DRAWS * share) ** 2 / (DRAWS * share) for i, share in wanted.items()
    )
    critical = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}
    assert statistic < critical[len(wanted) - 1]


@given(params=sampling, position=st.integers(0, 1 << 40))
def test_the_token_is_where_the_random_number_falls(params: SamplingParams, position: int) -> None:
    [token_id] = choose(LOGITS[None], [params], [position])
    wanted = expected(params)
    below = sum(share for i, share in wanted.items() if i < token_id)
    random = uniform(params.seed, position)
    assert token_id in wanted
    assert below - 1e-9 <= random <= below + wanted[token_id] + 1e-9


@settings(deadline=None)
@given(rows=rows_of_logits, data=st.data())
def test_a_row_is_chosen_as_if_alone_and_always_the_same(
    rows: list[list[float]], data: st.DataObject
) -> None:
    logits = torch.tensor(rows)
    choices = st.one_of(st.just(SamplingParams()), sampling)
    params = [data.draw(choices) for _ in rows]
    positions = [data.draw(st.integers(0, 1000)) for _ in rows]
    together = choose(logits, params, positions)
    assert together == choose(logits, params, positions)
    for row, token_id in enumerate(together):
        assert [token_id] == choose(logits[row : row + 1], [params[row]], [positions[row]])


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert choose(LOGITS[None], [SamplingParams()], [0]) == [2]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30])
def test_a_tiny_temperature_is_greedy_but_for_ties(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9)
    tokens = choose(LOGITS.expand(50, -1), [params] * 50, range(50))
    assert set(tokens) == {2, 7}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_p=1e-12),
        SamplingParams(temperature=1.0, min_p=1.0),
        SamplingParams(temperature=1.0, top_k=1),
    ],
    ids=str,
)
def test_the_narrowest_filter_keeps_the_best_token(params: SamplingParams) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert choose(logits, [params], [7]) == [1]


@pytest.mark.parametrize("random", [0.0, 5e-324, 0.5, 1.0 - 2.0**-53, 1.0])  # 1.0: rounded up
@pytest.mark.parametrize("dropped", [range(3), range(5, 8), (0, 7)], ids=str)
def test_a_dropped_token_is_not_drawn_at_the_ends_of_the_unit_interval(
    monkeypatch: pytest.MonkeyPatch, random: float, dropped: Sequence[int]
) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda _seed, _position: random)
    logits = torch.full((1, 8), 3.0)
    logits[0, list(dropped)] = 0.0
    for params in (
        SamplingParams(temperature=1.0, min_p=0.5),
        SamplingParams(temperature=1.0, top_k=8 - len(dropped)),
        SamplingParams(temperature=0.1, top_p=0.999),
    ):
        assert choose(logits, [params], [0])[0] not in dropped


def test_tokens_that_the_model_rules_out_are_never_drawn() -> None:
    logits = torch.full((200, 5), float("-inf"))
    logits[:, 1] = logits[:, 3] = 0.0
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(200)]
    assert set(choose(logits, params, [0] * 200)) == {1, 3}
