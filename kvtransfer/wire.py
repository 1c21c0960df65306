"""Between the protocol's data and the messages of the control stream."""

from __future__ import annotations

from baton.errors import BatonError, remote_error
from protos import kvtransfer_pb2

PROTOCOL_VERSION = 1


def ended_error(
    message: kvtransfer_pb2.Refuse | kvtransfer_pb2.Fenced | kvtransfer_pb2.Abort, who: str
) -> BatonError:
    """Why the peer ended a ticket, in words that say who did."""
    return remote_error(message.code, f"{who} ended the hand-off: {message.message}")
