"""Between the protocol's data and the messages of the control stream."""

from __future__ import annotations

from baton.errors import BatonError, remote_error
from kvtransfer.layout import Layout
from protos import common_pb2, kvtransfer_pb2

PROTOCOL_VERSION = 1


def layout_to_proto(layout: Layout, block_size: int) -> common_pb2.KvLayout:
    return common_pb2.KvLayout(
        model_fingerprint=layout.model_fingerprint,
        dtype=layout.dtype,
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        block_size=block_size,
    )


def layout_from_proto(message: common_pb2.KvLayout) -> Layout:
    return Layout(
        message.model_fingerprint,
        message.dtype,
        message.layers,
        message.kv_heads,
        message.head_dim,
    )


def ended_error(
    message: kvtransfer_pb2.Refuse | kvtransfer_pb2.Fenced | kvtransfer_pb2.Abort, who: str
) -> BatonError:
    """Why the peer ended a ticket, in words that say who did."""
    return remote_error(message.code, f"{who} ended the hand-off: {message.message}")
