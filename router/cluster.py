"""The router's nodes as the rest of it sees them: who is there, how loaded, and a way to each."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import structlog

from baton.config import Config
from baton.errors import BatonError, LinkLost
from baton.ids import Ticket
from baton.rpc import auth_metadata
from protos import node_pb2
from router import life_events as life
from router import membership as members
from router.life_events import Leg
from router.membership import Membership, NodeInfo
from router.node_link import NodeLink
from router.placement import NodeView, Placement, PlacementRequest, can_serve, place

log = structlog.get_logger()

TICK_S = 0.25


class Cluster:
    """Membership, streams and load. `on_event(ticket, event)` gets every event of every leg, and
    `on_lost(epoch, leg, error)` the end of all legs on a node."""

    def __init__(self, config: Config, model_fingerprint: str) -> None:
        self._config = config
        self._metadata = auth_metadata(config.token())
        self._membership = Membership(model_fingerprint, config.lease_s)
        self._links: dict[int, NodeLink] = {}  # by epoch
        self._load_tokens: Counter[int] = Counter()  # by epoch
        self._loop = asyncio.get_running_loop()
        self._closing: set[asyncio.Task[None]] = set()
        self._ticker = asyncio.create_task(self._tick())
        self.on_event: Callable[[Ticket, life.Event], None] = lambda ticket, event: None
        self.on_lost: Callable[[int, Leg, BatonError], None] = lambda epoch, leg, error: None
        self.on_ready: Callable[[bool], None] = lambda ready: None

    # --- the registry's side ---

    def handle(self, event: members.Event) -> None:
        """Take a registration, heartbeat, leave or tick in. Raises why a node is refused."""
        for action in self._membership.handle(event, self._loop.time()):
            match action:
                case members.Connect(node):
                    log.info("node joined", node=node.node_id, role=node.role, at=node.address)
                    self._links[node.epoch] = NodeLink(
                        node,
                        self._config,
                        self._metadata,
                        self._on_link_event,
                        self._on_link_change,
                    )
                case members.Disconnect(node, error):
                    log.warning("node gone", node=node.node_id, why=error.message)
                    self._drop(node, error)
        self.on_ready(self.ready)

    def knows(self, node_id: str, epoch: int) -> bool:
        return self._membership.knows(node_id, epoch)

    @property
    def ready(self) -> bool:
        """Whether some pair of nodes could serve a request now."""
        return can_serve(self._views())

    # --- the requests' side ---

    def place(self, request: PlacementRequest) -> Placement:
        return place(self._views(), request)

    def start(
        self, epoch: int, command: node_pb2.PrefillStart | node_pb2.DecodeStart, tokens: int
    ) -> None:
        """Send a leg that means this many tokens of work. Raises `LinkLost`."""
        self._link(epoch).start(command)
        self._load_tokens[epoch] += tokens

    def cancel(self, epoch: int, ticket: Ticket, reason: str) -> None:
        """Cancel a leg; a node that is gone has lost it anyway."""
        if (link := self._links.get(epoch)) is not None:
            link.cancel(ticket, reason)

    def leg_over(self, epoch: int, tokens: int) -> None:
        """A leg's work is off the node's hands."""
        if epoch in self._load_tokens:
            self._load_tokens[epoch] -= tokens

    async def close(self) -> None:
        self._ticker.cancel()
        for link in self._links.values():
            self._close_link(link)
        self._links.clear()
        await asyncio.gather(self._ticker, *self._closing, return_exceptions=True)

    def _views(self) -> list[NodeView]:
        return [
            NodeView(
                member.node,
                self._load_tokens[member.node.epoch],
                self._links[member.node.epoch].connected,
                member.draining,
            )
            for member in self._membership.members()
        ]

    def _link(self, epoch: int) -> NodeLink:
        link = self._links.get(epoch)
        if link is None:
            raise LinkLost("the node that was chosen is gone")
        return link

    def _drop(self, node: NodeInfo, error: BatonError) -> None:
        link = self._links.pop(node.epoch)
        self._close_link(link)
        self._load_tokens.pop(node.epoch, None)
        self.on_lost(node.epoch, node.role, error)

    def _close_link(self, link: NodeLink) -> None:
        task = asyncio.create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _on_link_event(self, ticket: Ticket, event: life.Event) -> None:
        self.on_event(ticket, event)

    def _on_link_change(self, node: NodeInfo, error: BatonError | None) -> None:
        if error is not None:
            self._load_tokens.pop(node.epoch, None)
            self.on_lost(node.epoch, node.role, error)
        self.on_ready(self.ready)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.handle(members.Tick())
