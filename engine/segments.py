"""What a step feeds to the model: the next tokens of each sequence in it. Pure.

One kind of step serves prefill and decode alike. A chunk of a prompt, one token of an answer, an
answer's token with guesses behind it, and a prompt computed again are all segments, and a step may
hold any mixture of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.sampling import SamplingParams

_GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one sequence at [start, stop); those before `start` are in the cache.

    `block_table` lists the sequence's blocks at least up to `stop`. After each of the last
    `choices` tokens the one that follows is chosen: none for a chunk in the middle of a prompt, one
    at its end, and as many as there are tokens where guesses are to be checked.
    """

    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    choices: int = 0
    sampling: SamplingParams = _GREEDY

    def __post_init__(self) -> None:
        assert self.token_ids, "a segment has at least one token"
        assert 0 <= self.choices <= len(self.token_ids)

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)
