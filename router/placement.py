"""Which pair of nodes serves a request. Pure.

For now the least loaded feasible pair: prefill nodes by the prompt tokens they were given and have
not let go of, decode nodes by the tokens of KV they are committed to. Ties go to the smaller node
id, so the same cluster and request always give the same pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton.errors import NoCapacity, Overloaded
from router.life_events import Leg
from router.membership import NodeInfo


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node that holds a lease, and the tokens of work that the router has given it."""

    node: NodeInfo
    load_tokens: int
    connected: bool = True
    draining: bool = False

    @property
    def usable(self) -> bool:
        return self.connected and not self.draining


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    prompt_tokens: int
    max_tokens: int

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV on the decode node: the last token of an answer is never fed back."""
        return self.prompt_tokens + self.max_tokens - 1


@dataclass(frozen=True, slots=True)
class Placement:
    prefill: NodeInfo
    decode: NodeInfo


def can_serve(nodes: Sequence[NodeView]) -> bool:
    """Whether some pair of these nodes could serve a small enough request."""
    return any(True for _ in _pairs(nodes))


def place(nodes: Sequence[NodeView], request: PlacementRequest) -> Placement:
    """The least loaded pair that can serve the request at all.

    Raises `NoCapacity` where a role is missing or no two nodes fit together, `Overloaded` where the
    request is larger than the KV caches of every pair.
    """
    for role in Leg:
        if not any(view.usable and view.node.role is role for view in nodes):
            raise NoCapacity(f"no {role} node is connected; start one with `baton {role}`")
    pairs = list(_pairs(nodes))
    if not pairs:
        raise NoCapacity(
            "no prefill node agrees with a decode node on dtype and KV layout; start both with "
            "the same --model, --dtype and --kv-dtype"
        )
    roomy = [
        (prefill, decode)
        for prefill, decode in pairs
        if prefill.node.kv_tokens >= request.prompt_tokens
        and decode.node.kv_tokens >= request.kv_tokens
    ]
    if not roomy:
        raise Overloaded(
            f"the request needs room for {request.prompt_tokens} tokens of KV on a prefill node "
            f"and {request.kv_tokens} on a decode node, and the largest have "
            f"{max(prefill.node.kv_tokens for prefill, _ in pairs)} and "
            f"{max(decode.node.kv_tokens for _, decode in pairs)}; shorten the prompt, lower "
            "max_tokens, or start the nodes with more --kv-memory-mib"
        )
    prefill, decode = min(roomy, key=_by_load)
    return Placement(prefill.node, decode.node)


def _pairs(nodes: Sequence[NodeView]) -> Iterator[tuple[NodeView, NodeView]]:
    decodes = [view for view in nodes if view.usable and view.node.role is Leg.DECODE]
    for prefill in nodes:
        if prefill.usable and prefill.node.role is Leg.PREFILL:
            for decode in decodes:
                if decode.node.layout == prefill.node.layout:
                    yield prefill, decode


def _by_load(pair: tuple[NodeView, NodeView]) -> tuple[int, int, str, str]:
    prefill, decode = pair
    return prefill.load_tokens, decode.load_tokens, prefill.node.node_id, decode.node.node_id
