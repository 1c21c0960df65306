"""Between the shared vocabulary and the messages that carry it."""

from __future__ import annotations

from baton.ids import Ticket
from baton.kv_layout import Layout
from baton.sampling import FinishReason, SamplingParams, StopParams
from protos import common_pb2, node_pb2

_FINISH_REASONS = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}


def ticket_to_proto(ticket: Ticket) -> common_pb2.Ticket:
    return common_pb2.Ticket(
        request_id=ticket.request_id,
        attempt=ticket.attempt,
        prefill_epoch=ticket.prefill_epoch,
        decode_epoch=ticket.decode_epoch,
    )


def ticket_from_proto(message: common_pb2.Ticket) -> Ticket:
    return Ticket(message.request_id, message.attempt, message.prefill_epoch, message.decode_epoch)


def finish_to_proto(reason: FinishReason) -> common_pb2.FinishReason:
    return _FINISH_REASONS[reason]


def finish_from_proto(reason: common_pb2.FinishReason) -> FinishReason:
    """Raises ValueError for a reason this release does not know."""
    for known, number in _FINISH_REASONS.items():
        if number == reason:
            return known
    raise ValueError(f"unknown finish reason {reason}")


def sampling_to_proto(sampling: SamplingParams, stop: StopParams) -> node_pb2.ResolvedSampling:
    return node_pb2.ResolvedSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        max_tokens=stop.max_tokens,
        ignore_eos=stop.ignore_eos,
    )


def sampling_from_proto(message: node_pb2.ResolvedSampling) -> tuple[SamplingParams, StopParams]:
    sampling = SamplingParams(
        message.temperature, message.top_k, message.top_p, message.min_p, message.seed
    )
    return sampling, StopParams(message.max_tokens, message.ignore_eos)


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
