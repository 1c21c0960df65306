"""From logits to a token. The same logits, parameters and position give the same token anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.sampling import SamplingParams, uniform


def choose(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """One token for each row of float32 [rows, vocabulary] logits.

    `positions` are the places of the new tokens in their whole sequences, prompt included: the
    first token of the answer to a prompt of n tokens has position n.
    """
    chosen: list[int] = logits.argmax(dim=-1).tolist()  # the lowest id among equals
    for row, (param, position) in enumerate(zip(params, positions, strict=True)):
        if not param.greedy:
            chosen[row] = _sample(logits[row], param, uniform(param.seed, position))
    return chosen


def _sample(logits: torch.Tensor, params: SamplingParams, random: float) -> int:
    """Invert the distribution function of the kept tokens, in the order of their ids."""
    weights = _kept_probabilities(logits, params)
    cumulative = weights.cumsum(0)
    target = random * cumulative[-1]
    # The first id whose cumulative weight exceeds the target; rounding must not run off the end,
    # nor land on a token that was not kept.
    token_id = int(torch.searchsorted(cumulative, target, right=True))
    last_kept = int(weights.nonzero()[-1])
    return min(token_id, last_kept)


def _kept_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """float64 [vocabulary]: probabilities after temperature, 0 where top-k, top-p or min-p drop."""
    # The greatest logit first becomes 0: divided by a tiny temperature it would become infinite.
    wide = logits.double()
    probabilities = ((wide - wide.max()) / params.temperature).softmax(-1)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if 0 < params.top_k < len(probabilities):
        keep &= probabilities >= probabilities.topk(params.top_k).values[-1]
    if params.top_p < 1.0:
        # The smallest set of likeliest tokens whose mass reaches top_p (Holtzman et al. 2020), of
        # those that top-k has kept.
        kept = (probabilities * keep) / (probabilities * keep).sum()
        ordered, order = kept.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        keep[order[before >= params.top_p]] = False
    if params.min_p > 0.0:
        keep &= probabilities >= params.min_p * probabilities.max()
    return probabilities * keep
