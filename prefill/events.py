"""What can happen to a leg on a prefill node, and what its shell may be told to do. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from baton.errors import BatonError
from baton.ids import Ticket
from baton.leg_events import Cancel, CancelHandOff, Fail, Finish, Released, StepFailed
from baton.sampling import StopParams

# What happens.


@dataclass(frozen=True, slots=True)
class Arrive:
    """The router starts a leg, whose first token is wanted by `due`."""

    ticket: Ticket
    prompt: tuple[int, ...]
    stop: StopParams
    due: float
    deadline: float
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class StepDone:
    """The running step has ended; the token chosen for each chunk that ends its prompt."""

    token_ids: Mapping[Ticket, int]
    seconds: float


@dataclass(frozen=True, slots=True)
class HandOffEnded:
    """The hand-off reads the blocks no more; `error` is None when it was committed."""

    ticket: Ticket
    error: BatonError | None


Event = Arrive | Cancel | StepDone | StepFailed | HandOffEnded

# What to do.


@dataclass(frozen=True, slots=True)
class BeginHandOff:
    """Offer the prompt's KV; that of its first `cached_tokens` is in the blocks already."""

    ticket: Ticket
    block_table: tuple[int, ...]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class EndHandOff:
    """Everything is computed: the hand-off may end with this first token."""

    ticket: Ticket
    first_token_id: int


@dataclass(frozen=True, slots=True)
class Token:
    """Tell the router the answer's first token."""

    ticket: Ticket
    token_id: int


Action = BeginHandOff | EndHandOff | CancelHandOff | Token | Finish | Fail | Released


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute the prompt's tokens [start, stop); `last` ends the prompt and gives a token."""

    ticket: Ticket
    start: int
    stop: int
    block_table: tuple[int, ...]
    first: bool
    last: bool
