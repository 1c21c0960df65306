"""What can happen to a request, and what its life asks its shell to do. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from baton.errors import BatonError
from baton.sampling import FinishReason


class Leg(StrEnum):
    """The two halves of an attempt."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Placed:
    """A pair of nodes has been chosen."""


@dataclass(frozen=True, slots=True)
class Started:
    """The prefill node computes, but for the first `cached_tokens` of the prompt."""

    elapsed_s: float
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Degraded:
    """A leg goes on, but not as configured."""

    reason: str


@dataclass(frozen=True, slots=True)
class TokensArrived:
    leg: Leg
    index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Transferred:
    """The decode node has verified and committed the KV."""

    elapsed_s: float


@dataclass(frozen=True, slots=True)
class LegFinished:
    """The answer is whole; `leg` wrote its last token."""

    leg: Leg
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class LegFailed:
    """The leg cannot go on; it releases what it holds by itself."""

    leg: Leg
    error: BatonError


@dataclass(frozen=True, slots=True)
class LegReleased:
    leg: Leg


@dataclass(frozen=True, slots=True)
class LegLost:
    """The leg's node is gone, and the leg with it."""

    leg: Leg
    error: BatonError


@dataclass(frozen=True, slots=True)
class End:
    """Somebody ends the request: its client, an Abort, its deadline, the router's stop."""

    error: BatonError


@dataclass(frozen=True, slots=True)
class ReleaseOverdue:
    """The request has ended, and its nodes have had their time to say that they let go of it."""


Event = (
    Placed
    | Started
    | Degraded
    | TokensArrived
    | Transferred
    | LegFinished
    | LegFailed
    | LegReleased
    | LegLost
    | End
    | ReleaseOverdue
)


@dataclass(frozen=True, slots=True)
class StartLegs:
    """Send both legs to their nodes, at once."""


@dataclass(frozen=True, slots=True)
class Emit:
    """Give the client these tokens; the first has this index in the answer."""

    index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Fail:
    error: BatonError


@dataclass(frozen=True, slots=True)
class CancelLeg:
    leg: Leg
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Neither node holds anything of the request any more."""


Action = StartLegs | Emit | Finish | Fail | CancelLeg | Forget
