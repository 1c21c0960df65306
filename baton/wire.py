"""Between the shared vocabulary and the messages that carry it."""

from __future__ import annotations

from collections.abc import Iterator

from baton.cache_events import CacheEvent, CacheNews, Removed, Stored
from baton.ids import Ticket
from baton.kv_layout import Layout
from baton.sampling import FinishReason, SamplingParams, StopParams
from protos import common_pb2, node_pb2

_FINISH_REASONS = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}

CACHE_EVENTS_PER_MESSAGE = 2048


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


def cache_messages(epoch: int, news: CacheNews) -> Iterator[node_pb2.CacheEvents]:
    """News of a node's prefix cache, in messages of a bounded size; at least one."""
    for begin in range(0, max(1, len(news.events)), CACHE_EVENTS_PER_MESSAGE):
        end = begin + CACHE_EVENTS_PER_MESSAGE
        yield node_pb2.CacheEvents(
            epoch=epoch,
            anew=news.anew and begin == 0,
            next_number=news.next_number if end >= len(news.events) else 0,
            events=[_cache_event(event) for event in news.events[begin:end]],
        )


def _cache_event(event: CacheEvent) -> node_pb2.CacheEvent:
    match event:
        case Stored(block, parent):
            stored = node_pb2.StoredBlock(block=block, parent=parent or b"")
            return node_pb2.CacheEvent(stored=stored)
        case Removed(block):
            return node_pb2.CacheEvent(removed=block)


def cache_events_from_proto(message: node_pb2.CacheEvents) -> list[CacheEvent]:
    """The inverse, of one message. Events that we do not know are left out."""
    events: list[CacheEvent] = []
    for event in message.events:
        match event.WhichOneof("event"):
            case "stored":
                events.append(Stored(event.stored.block, event.stored.parent or None))
            case "removed":
                events.append(Removed(event.removed))
    return events
