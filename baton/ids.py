"""Who is who: requests, attempts, node epochs, and the ticket that ties them together."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

MAX_REQUEST_ID_LENGTH = 128


@dataclass(frozen=True, slots=True)
class Ticket:
    """One attempt of one request on one pair of nodes.

    Everything that belongs to the attempt carries its ticket, and whatever carries another ticket
    is dropped (promise P6). An epoch names one life of a node, so the messages of a node that died
    can never be taken for those of its successor.
    """

    request_id: str
    attempt: int
    prefill_epoch: int
    decode_epoch: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.attempt}"


def new_request_id() -> str:
    """A fresh request id: 128 random bits in hexadecimal."""
    return secrets.token_hex(16)


def new_epoch() -> int:
    """A fresh node epoch: 63 random bits, never 0."""
    return secrets.randbits(63) | 1


def new_seed() -> int:
    """A fresh sampling seed for a request that names none. 53 bits: JSON keeps it exact."""
    return secrets.randbits(53)
