"""The commands that start the two legs of a request. Pure."""

from __future__ import annotations

from baton.ids import Ticket
from baton.sampling import SamplingParams, StopParams
from baton.wire import sampling_to_proto, ticket_to_proto
from protos import node_pb2
from router.life_events import Leg
from router.placement import Placement

StartCommand = node_pb2.PrefillStart | node_pb2.DecodeStart


def start_commands(
    ticket: Ticket,
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    stop: StopParams,
    placement: Placement,
    deadline_s: float,
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
        ),
        Leg.DECODE: node_pb2.DecodeStart(
            ticket=ticket_proto,
            prompt_tokens=len(prompt),
            sampling=sampling_proto,
            deadline_s=deadline_s,
        ),
    }
