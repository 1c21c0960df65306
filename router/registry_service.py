"""The gRPC shell of the registry: nodes join, renew and leave."""

from __future__ import annotations

import grpc.aio

from baton.errors import BatonError, InvalidRequest
from baton.rpc import abort_with
from baton.wire import layout_from_proto
from protos import common_pb2, registry_pb2, registry_pb2_grpc
from router.cluster import Cluster
from router.life_events import Leg
from router.membership import Heartbeat, Leave, NodeInfo, Register

_ROLES = {common_pb2.ROLE_PREFILL: Leg.PREFILL, common_pb2.ROLE_DECODE: Leg.DECODE}


class RegistryService(registry_pb2_grpc.RegistryServicer):
    def __init__(self, cluster: Cluster, lease_s: float) -> None:
        self._cluster = cluster
        self._lease_s = lease_s

    async def Register(
        self, request: registry_pb2.RegisterRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.RegisterResponse:
        try:
            self._cluster.handle(Register(_node_from_proto(request.node)))
        except BatonError as error:
            await abort_with(context, error)
        return registry_pb2.RegisterResponse(lease_s=self._lease_s)

    async def Heartbeat(
        self, request: registry_pb2.HeartbeatRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.HeartbeatResponse:
        self._cluster.handle(Heartbeat(request.node_id, request.epoch, request.draining))
        known = self._cluster.knows(request.node_id, request.epoch)
        return registry_pb2.HeartbeatResponse(known=known)

    async def Leave(
        self, request: registry_pb2.LeaveRequest, context: grpc.aio.ServicerContext
    ) -> registry_pb2.LeaveResponse:
        self._cluster.handle(Leave(request.node_id, request.epoch))
        return registry_pb2.LeaveResponse()


def _node_from_proto(node: registry_pb2.NodeInfo) -> NodeInfo:
    if node.role not in _ROLES:
        raise InvalidRequest("a node registers as prefill or decode")
    return NodeInfo(
        node.node_id,
        _ROLES[node.role],
        node.epoch,
        node.address,
        layout_from_proto(node.layout),
        node.layout.block_size,
        node.blocks_total,
        node.max_running,
    )
