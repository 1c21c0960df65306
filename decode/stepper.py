"""Runs a decode node's steps on the engine, with guesses behind the rows that may have them.

Everything here happens on the engine's thread, but `forget`. The guesses come from the sequences
themselves, or from a smaller draft model that reads along in a cache of its own. The draft's cache
has as many blocks as the node's, of the same size, and a sequence has the same block table in both:
so nobody has to account for the draft's blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.errors import ConfigError
from baton.ids import Ticket
from decode.events import Row
from decode.guesses import Pace, PromptLookup, right_guesses
from engine.runner import Runner
from engine.segments import Segment

_READ_TOKENS = 256
"""Most tokens of a sequence that the draft model reads in one step."""


@dataclass(slots=True)
class _Sequence:
    lookup: PromptLookup
    pace: Pace = field(default_factory=Pace)
    drafted: list[int] = field(default_factory=list)  # tokens whose KV is in the draft's cache


class Stepper:
    """Steps of one decode node, one at a time."""

    def __init__(self, runner: Runner, draft: Runner | None = None) -> None:
        if draft is not None:
            _check_draft(runner, draft)
        self._runner = runner
        self._draft = draft
        self._sequences: dict[Ticket, _Sequence] = {}
        self.counters: Counter[str] = Counter(guesses_tried=0, guesses_right=0)

    def forget(self, tickets: Sequence[Ticket]) -> None:
        """These have ended, or lost their blocks; none of them is in a running step."""
        for ticket in tickets:
            self._sequences.pop(ticket, None)

    def run(self, rows: Sequence[Row]) -> dict[Ticket, tuple[int, ...]]:
        """The tokens that the model chooses in each row: guesses it agrees with, and one more."""
        guesses = self._guess([row for row in rows if row.guesses])
        segments = []
        for row in rows:
            tried = guesses.get(row.ticket, ())
            choices = len(tried) + 1 if row.last else 0
            token_ids = row.token_ids + tried
            segments.append(Segment(token_ids, row.start, row.block_table, choices, row.sampling))
        chosen = self._runner.step(segments)
        result = {}
        for row, tokens in zip(rows, chosen, strict=True):
            tried = guesses.get(row.ticket, ())
            right = right_guesses(tried, tokens)
            result[row.ticket] = tuple(tokens[: right + 1])
            if tried:
                self._sequences[row.ticket].pace.learn(len(tried), right)
                self.counters["guesses_tried"] += len(tried)
                self.counters["guesses_right"] += right
        return result

    def _guess(self, rows: Sequence[Row]) -> dict[Ticket, tuple[int, ...]]:
        wanted: list[tuple[Row, _Sequence, int]] = []
        for row in rows:
            sequence = self._sequences.setdefault(row.ticket, _Sequence(PromptLookup()))
            if length := sequence.pace.length(row.guesses):
                wanted.append((row, sequence, length))
        if self._draft is not None:
            return _draft_guesses(self._draft, wanted)
        guesses = {}
        for row, sequence, length in wanted:
            sequence.lookup.extend(row.known[len(sequence.lookup.token_ids) :])
            guesses[row.ticket] = sequence.lookup.guess(length)
        return guesses


def _draft_guesses(
    draft: Runner, wanted: Sequence[tuple[Row, _Sequence, int]]
) -> dict[Ticket, tuple[int, ...]]:
    """Let the draft model read what it has not read, and go on from there, all rows at once.

    It chooses by the same parameters and random numbers as the model will. A prompt that is long
    and new to it is read over several steps, without guesses.
    """
    guesses: dict[Ticket, tuple[int, ...]] = {row.ticket: () for row, _, _ in wanted}
    while wanted:
        segments = []
        for row, sequence, _ in wanted:
            tokens = row.known + guesses[row.ticket]
            read = right_guesses(sequence.drafted, tokens[:-1])
            part = tokens[read : read + _READ_TOKENS]
            choices = int(read + len(part) == len(tokens))
            segments.append(Segment(part, read, row.block_table, choices, row.sampling))
            sequence.drafted = list(tokens[: read + len(part)])
        going_on = []
        for (row, sequence, length), chosen in zip(wanted, draft.step(segments), strict=True):
            guesses[row.ticket] += tuple(chosen)
            if chosen and len(guesses[row.ticket]) < length:
                going_on.append((row, sequence, length))
        wanted = going_on
    return guesses


def _check_draft(runner: Runner, draft: Runner) -> None:
    assert draft.cache.block_size == runner.cache.block_size
    assert draft.cache.blocks >= runner.cache.blocks
    if draft.spec.vocabulary_size != runner.spec.vocabulary_size:
        raise ConfigError(
            f"the draft model's vocabulary has {draft.spec.vocabulary_size} tokens and the model's "
            f"{runner.spec.vocabulary_size}; choose a --draft-model of the same family"
        )
