"""The commands that start the two legs of a request. Pure."""

from __future__ import annotations

from baton.ids import Ticket
from baton.sampling import SamplingParams, StopParams
from baton.wire import sampling_to_proto, ticket_to_proto
from protos import node_pb2
from router.life_events import Leg
from router.placement import Placement

StartCommand = node_pb2.PrefillStart | node_pb2.DecodeStart

DUE_S = 1.0
DUE_TOKEN_S = 0.002
"""A first token is due after a second, and two milliseconds for each token of the prompt: what a
long prompt needs anyway must not put it before all short ones."""


def first_token_due_s(prompt_tokens: int) -> float:
    """Within how many seconds the first token is wanted."""
    return DUE_S + DUE_TOKEN_S * prompt_tokens


def start_commands(
    ticket: Ticket,
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    stop: StopParams,
    placement: Placement,
    deadline_s: float,
    cache_salt: str,
) -> dict[Leg, StartCommand]:
    """What each node is told; `deadline_s` is the time left."""
    ticket_proto = ticket_to_proto(ticket)
    sampling_proto = sampling_to_proto(sampling, stop)
    return {
        Leg.PREFILL: node_pb2.PrefillStart(
            ticket=ticket_proto,
            prompt_token_ids=prompt,
            sampling=sampling_proto,
            decode_address=placement.decode.address,
            deadline_s=deadline_s,
            due_s=min(deadline_s, first_token_due_s(len(prompt))),
            cache_salt=cache_salt,
        ),
        Leg.DECODE: node_pb2.DecodeStart(
            ticket=ticket_proto,
            prompt_token_ids=prompt,
            sampling=sampling_proto,
            deadline_s=deadline_s,
            cache_salt=cache_salt,
        ),
    }
