"""Which nodes the router has: leases, epochs, and who may be paired with whom. Pure.

A node holds a lease that its heartbeats renew. A node id that comes back with a new epoch is a new
node, and the old one is gone (P6). A node that serves another model is refused with a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from baton.errors import IncompatiblePeer, InvalidRequest, LinkLost, NodeStopping, Overloaded
from baton.kv_layout import Layout
from router.life_events import Leg

MAX_NODES = 4096
MAX_NODE_ID_LENGTH = 128


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One life of a node, as it registered itself."""

    node_id: str
    role: Leg
    epoch: int
    address: str
    layout: Layout
    block_size: int
    blocks_total: int
    max_running: int

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit in the node's KV cache."""
        return self.blocks_total * self.block_size


@dataclass(frozen=True, slots=True)
class Register:
    node: NodeInfo


@dataclass(frozen=True, slots=True)
class Heartbeat:
    node_id: str
    epoch: int
    draining: bool


@dataclass(frozen=True, slots=True)
class Leave:
    node_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Register | Heartbeat | Leave | Tick


@dataclass(frozen=True, slots=True)
class Connect:
    """Open the stream to a node that has just come."""

    node: NodeInfo


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the stream to a node that is gone; its legs are lost for this reason."""

    node: NodeInfo
    error: LinkLost | NodeStopping


Action = Connect | Disconnect


@dataclass(frozen=True, slots=True)
class Member:
    node: NodeInfo
    lease_ends: float
    draining: bool = False


class Membership:
    """The nodes that hold a lease of `lease_s` seconds."""

    def __init__(self, model_fingerprint: str, lease_s: float) -> None:
        self._model_fingerprint = model_fingerprint
        self._lease_s = lease_s
        self._members: dict[str, Member] = {}

    def members(self) -> list[Member]:
        return list(self._members.values())

    def check_invariants(self) -> None:
        assert len(self._members) <= MAX_NODES
        epochs = [member.node.epoch for member in self._members.values()]
        assert len(set(epochs)) == len(epochs), "an epoch names one life of one node"
        assert all(node_id == member.node.node_id for node_id, member in self._members.items())

    def knows(self, node_id: str, epoch: int) -> bool:
        member = self._members.get(node_id)
        return member is not None and member.node.epoch == epoch

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event in. A registration that is refused raises the reason."""
        match event:
            case Register(node):
                return self._register(node, now)
            case Heartbeat(node_id, epoch, draining):
                if self.knows(node_id, epoch):
                    self._members[node_id] = replace(
                        self._members[node_id],
                        lease_ends=now + self._lease_s,
                        draining=draining,
                    )
                return []
            case Leave(node_id, epoch):
                if not self.knows(node_id, epoch):
                    return []
                return [self._remove(node_id, NodeStopping(f"the node {node_id} has left"))]
            case Tick():
                gone = [i for i, member in self._members.items() if now >= member.lease_ends]
                return [
                    self._remove(i, LinkLost(f"the node {i} was silent for {self._lease_s:g} s"))
                    for i in gone
                ]

    def _register(self, node: NodeInfo, now: float) -> list[Action]:
        if not node.node_id or len(node.node_id) > MAX_NODE_ID_LENGTH or not node.address:
            raise InvalidRequest(
                f"a node registers with an address and an id of 1 to {MAX_NODE_ID_LENGTH} "
                "characters; set --node-id"
            )
        if node.blocks_total < 1 or node.block_size < 1:
            raise InvalidRequest("a node registers with a KV cache; raise --kv-memory-mib")
        if node.layout.model_fingerprint != self._model_fingerprint:
            raise IncompatiblePeer(
                f"the node {node.node_id} serves the model {node.layout.model_fingerprint}, but "
                f"the router {self._model_fingerprint}; start both with the same --model"
            )
        if any(
            other.node.epoch == node.epoch and other.node.node_id != node.node_id
            for other in self._members.values()
        ):
            raise InvalidRequest(f"another node has the epoch {node.epoch}; draw a new one")
        known = self._members.get(node.node_id)
        actions: list[Action] = []
        if known is None:
            if len(self._members) >= MAX_NODES:
                raise Overloaded(
                    f"the router has {MAX_NODES} nodes, the most it takes; stop one first"
                )
            actions.append(Connect(node))
        elif known.node != node:
            restarted = LinkLost(f"the node {node.node_id} has restarted")
            actions += [self._remove(node.node_id, restarted), Connect(node)]
        self._members[node.node_id] = Member(node, now + self._lease_s)
        return actions

    def _remove(self, node_id: str, error: LinkLost | NodeStopping) -> Disconnect:
        return Disconnect(self._members.pop(node_id).node, error)
