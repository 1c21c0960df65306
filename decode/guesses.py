"""What an answer will say next, guessed from what it and its prompt have said, and how far to go.

Prompt lookup (Saxena 2023; Leviathan et al. 2023 for why guesses may be checked in one step): where
the last few tokens stood before, what followed them then may follow now. Every guess is checked by
the model itself, which chooses after each the token it would have chosen anyway: guesses change
when a token is known, never which. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LONGEST_NGRAM = 4
SHORTEST_NGRAM = 2

_RATE_SHARE = 0.25
"""How much the latest step counts in the estimate of how many guesses are right."""

_LEAST_CHANCE = 0.25
"""A guess is tried while the chance that it and all before it are right is at least this. It costs
one more row in products that are bound by reading weights: on one core, with the default model in
bfloat16, a step of five tokens took as long as one of one, and one of nine a fifth longer."""

_RETRY_STEPS = 16
"""Who guesses badly is asked again after so many steps: texts change."""


@dataclass(slots=True)
class Pace:
    """How far to guess ahead in one sequence, by how it went so far."""

    rate: float = 0.6
    _idle: int = 0

    def length(self, most: int) -> int:
        """How many guesses to try, `most` at the most."""
        count, chance = 0, self.rate
        while count < most and chance >= _LEAST_CHANCE:
            count += 1
            chance *= self.rate
        if count == 0 and most > 0:
            self._idle += 1
            if self._idle >= _RETRY_STEPS:
                self._idle = 0
                return 1
        return count

    def learn(self, tried: int, right: int) -> None:
        """Take in how many of the guesses tried were right: those before the first wrong one."""
        judged = min(tried, right + 1)  # what follows on a wrong guess tells nothing
        if judged:
            self.rate += _RATE_SHARE * (right / judged - self.rate)


@dataclass(slots=True)
class PromptLookup:
    """The tokens of one sequence, and where each run of a few of them stood last."""

    token_ids: list[int] = field(default_factory=list)
    _after: dict[tuple[int, ...], int] = field(default_factory=dict)
    _indexed: int = 0  # runs that end before here are in the index

    def extend(self, token_ids: Sequence[int]) -> None:
        self.token_ids += token_ids

    def guess(self, most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may follow; none where nothing of the kind stood before."""
        known = self.token_ids
        # The run at the very end is not indexed yet: it would find itself.
        for end in range(max(1, self._indexed), len(known)):
            for length in range(SHORTEST_NGRAM, min(LONGEST_NGRAM, end) + 1):
                self._after[tuple(known[end - length : end])] = end
        self._indexed = max(1, len(known))
        for length in range(min(LONGEST_NGRAM, len(known)), SHORTEST_NGRAM - 1, -1):
            place = self._after.get(tuple(known[len(known) - length :]))
            if place is not None:
                return tuple(known[place : place + most])
        return ()


def right_guesses(guesses: Sequence[int], chosen: Sequence[int]) -> int:
    """How many guesses the model agrees with: `chosen` holds its own token after each."""
    count = 0
    for guess, choice in zip(guesses, chosen, strict=False):
        if guess != choice:
            break
        count += 1
    return count
