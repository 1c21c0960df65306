"""What can happen to a ticket, and what the shell can be told to do about it. Pure data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from baton.errors import BatonError, DeadlineExceeded
from baton.ids import Ticket
from kvtransfer.layout import Unit

# What happens to a ticket.


@dataclass(frozen=True, slots=True)
class Begin:
    """Sender: this node starts to compute the ticket's prompt and wants to hand it over."""

    ticket: Ticket
    deadline: float


@dataclass(frozen=True, slots=True)
class UnitReady:
    """Sender: one layer of one chunk has been computed."""

    ticket: Ticket
    unit: Unit


@dataclass(frozen=True, slots=True)
class Computed:
    """Sender: the whole prompt has been computed, and this is the answer's first token."""

    ticket: Ticket
    first_token_id: int


@dataclass(frozen=True, slots=True)
class Accepted:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Committed:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Reserve:
    """Receiver: blocks for the ticket are leased, and these many prompt tokens are expected."""

    ticket: Ticket
    prompt_tokens: int
    layers: int
    deadline: float


@dataclass(frozen=True, slots=True)
class Offered:
    """Receiver: the peer wants to send; the manifest has been checked."""

    ticket: Ticket
    prompt_tokens: int
    deadline: float


@dataclass(frozen=True, slots=True)
class UnitArrived:
    """Receiver: the link thread received a unit, and wrote it if its checksums were right."""

    ticket: Ticket
    unit: Unit
    intact: bool


@dataclass(frozen=True, slots=True)
class DoneReached:
    """Receiver: the link thread came to the end of the ticket's units."""

    ticket: Ticket
    first_token_id: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """This node ends the hand-off."""

    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class PeerEnded:
    """The other node refused, fenced or aborted the ticket."""

    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class LinkFenced:
    """The link thread will not touch the ticket's blocks again."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class LinkEnded:
    """The link is closed and its thread has ended."""

    ticket: Ticket
    error: BatonError


# What the shell must do.


@dataclass(frozen=True, slots=True)
class SendOffer:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class QueueUnit:
    """Give the link thread a unit to send."""

    ticket: Ticket
    unit: Unit


@dataclass(frozen=True, slots=True)
class QueueDone:
    """Give the link thread the end of the ticket, to be sent after its units."""

    ticket: Ticket
    first_token_id: int


@dataclass(frozen=True, slots=True)
class SendAbort:
    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class SendAccept:
    """Let the link thread write this ticket's units, then tell the peer to send them."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class SendRefuse:
    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class SendFenced:
    ticket: Ticket
    error: BatonError


@dataclass(frozen=True, slots=True)
class Commit:
    """The KV is whole: tell the peer, and give the blocks to the sequence."""

    ticket: Ticket
    first_token_id: int


@dataclass(frozen=True, slots=True)
class FenceLink:
    """Keep the link thread off this ticket's blocks; it answers with `LinkFenced`."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Release:
    """This hand-off holds the ticket's blocks no more. `error` is None after a commit."""

    ticket: Ticket
    error: BatonError | None


SenderEvent = (
    Begin
    | UnitReady
    | Computed
    | Accepted
    | Committed
    | Cancel
    | PeerEnded
    | LinkFenced
    | LinkEnded
)
ReceiverEvent = (
    Reserve | Offered | UnitArrived | DoneReached | Cancel | PeerEnded | LinkFenced | LinkEnded
)
Action = (
    SendOffer
    | QueueUnit
    | QueueDone
    | SendAbort
    | SendAccept
    | SendRefuse
    | SendFenced
    | Commit
    | FenceLink
    | Release
)


def cancel_expired(
    handle: Callable[[Cancel], list[Action]], deadlines: Iterable[tuple[Ticket, float]], now: float
) -> list[Action]:
    """Cancel every ticket whose deadline has passed (rule 6)."""
    actions: list[Action] = []
    for ticket, deadline in deadlines:
        if now >= deadline:
            error = DeadlineExceeded("the hand-off did not end by the request's deadline")
            actions += handle(Cancel(ticket, error))
    return actions
