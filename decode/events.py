"""What can happen to a leg on a decode node, and what its shell may be told to do. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from baton.errors import BatonError
from baton.ids import Ticket
from baton.leg_events import Cancel, CancelHandOff, Fail, Finish, Released, StepFailed
from baton.sampling import SamplingParams, StopParams

# What happens.


@dataclass(frozen=True, slots=True)
class Arrive:
    """The router starts a leg. The prompt's tokens are kept, in case its KV has to be made anew."""

    ticket: Ticket
    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop: StopParams
    deadline: float
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Committed:
    """The prompt's KV is whole in the leg's blocks; prefill has chosen the first token."""

    ticket: Ticket
    first_token_id: int


@dataclass(frozen=True, slots=True)
class HandOffEnded:
    """The hand-off failed or was cancelled, and writes to the blocks no more."""

    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class StepDone:
    """The running step has ended; the tokens chosen for each of its rows, in order.

    None for a row that has more to compute before it, else one or, behind guesses that were right,
    several.
    """

    token_ids: Mapping[Ticket, tuple[int, ...]]


Event = Arrive | Committed | HandOffEnded | Cancel | StepDone | StepFailed

# What to do.


@dataclass(frozen=True, slots=True)
class Reserve:
    """Expect the prompt's KV in these blocks."""

    ticket: Ticket
    prompt_tokens: int
    block_table: tuple[int, ...]
    deadline: float


@dataclass(frozen=True, slots=True)
class Transferred:
    """Tell the router that the KV has been committed."""

    ticket: Ticket
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Token:
    """Tell the router the answer's token with this index."""

    ticket: Ticket
    index: int
    token_id: int


Action = Reserve | CancelHandOff | Transferred | Token | Finish | Fail | Released


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a step: feed `token_ids` from position `start` on.

    `last` says that they reach the end of what is known, so that a token is chosen after them, and
    up to `guesses` more may be tried behind them: there is room for their KV. `known` are then all
    tokens of the sequence.
    """

    ticket: Ticket
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    sampling: SamplingParams
    last: bool = True
    guesses: int = 0
    known: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """What to compute now, and who lost its blocks for it: they go on later."""

    rows: tuple[Row, ...]
    preempted: tuple[Ticket, ...] = ()
