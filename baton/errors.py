"""Every error that crosses a room, and the gRPC code each one becomes.

A `BatonError` carries a sentence that tells its reader what to change. The code is part of the
type, so a shell never chooses one: it passes on what the error says.
"""

from __future__ import annotations

from enum import StrEnum


class Code(StrEnum):
    """The gRPC status codes Baton answers with, by their names in `google/rpc/code.proto`."""

    CANCELLED = "CANCELLED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    INTERNAL = "INTERNAL"


HTTP_STATUS: dict[Code, int] = {
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.UNAVAILABLE: 503,
    Code.DATA_LOSS: 500,
    Code.UNAUTHENTICATED: 401,
    Code.INTERNAL: 500,
}
"""The HTTP status for each code, after the mapping in `google/rpc/code.proto`."""


class BatonError(Exception):
    """Base of all: `code` says what kind of failure, the message says what to change."""

    code: Code = Code.INTERNAL

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(BatonError):
    """The request can never be served as it is."""

    code = Code.INVALID_ARGUMENT


class UnknownModel(BatonError):
    """The model that was asked for is not the one that is served, or cannot be found."""

    code = Code.NOT_FOUND


class UnsupportedModel(BatonError):
    """The model's files are there, but Baton cannot run them."""

    code = Code.FAILED_PRECONDITION


class DuplicateRequest(BatonError):
    """A request with this id is in flight."""

    code = Code.ALREADY_EXISTS


class Overloaded(BatonError):
    """No room now; trying again later can succeed."""

    code = Code.RESOURCE_EXHAUSTED


class NoCapacity(BatonError):
    """No node can take part in serving this now."""

    code = Code.UNAVAILABLE


class NodeStopping(BatonError):
    """The node is being shut down."""

    code = Code.UNAVAILABLE


class Cancelled(BatonError):
    """Somebody who may do so ended the request."""

    code = Code.CANCELLED


class DeadlineExceeded(BatonError):
    """The request's deadline passed."""

    code = Code.DEADLINE_EXCEEDED


class LinkLost(BatonError):
    """The link between two nodes broke, or its peer did."""

    code = Code.UNAVAILABLE


class EngineFailed(BatonError):
    """A step of the model raised."""

    code = Code.INTERNAL


class CorruptTransfer(BatonError):
    """KV arrived that is not what was sent."""

    code = Code.DATA_LOSS


class IncompatiblePeer(BatonError):
    """The two sides of a hand-off do not agree on model, dtype, layout or protocol version."""

    code = Code.FAILED_PRECONDITION


class Unauthenticated(BatonError):
    """The caller did not show the cluster's token."""

    code = Code.UNAUTHENTICATED


class ConfigError(BatonError):
    """A flag, variable or file says something that cannot be."""

    code = Code.FAILED_PRECONDITION


class RemoteError(BatonError):
    """A failure that another node reported, with that node's code."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


def remote_error(code: str, message: str) -> RemoteError:
    """The error a peer named by its code; a code we do not know counts as INTERNAL."""
    return RemoteError(Code(code) if code in Code.__members__ else Code.INTERNAL, message)
