"""What can happen to a leg on either kind of node, and what its shell may be told. Pure data.

The events and actions that a prefill and a decode leg have in common.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import BatonError
from baton.ids import Ticket
from baton.sampling import FinishReason

# What happens.


@dataclass(frozen=True, slots=True)
class Cancel:
    """The router wants this leg no more."""

    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The running step raised."""

    error: BatonError


# What to do.


@dataclass(frozen=True, slots=True)
class CancelHandOff:
    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class Finish:
    """Tell the router that the answer is whole, by the word of this node."""

    ticket: Ticket
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Fail:
    """Tell the router that this leg cannot go on."""

    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class Released:
    """Tell the router that this leg holds nothing any more. Its last action."""

    ticket: Ticket
