"""What every gRPC server and channel of Baton shares: limits, the token, health, reflection.

A server listens on exactly the address it is given, answers `grpc.health.v1` per service, and
shows its services by reflection. With a token configured, every call but a health check must carry
it as `authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.config import Config, join_address, split_address
from baton.errors import BatonError, Code, ConfigError, RemoteError, remote_error

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
]


def message_limits(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    ]


class _TokenGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

        async def refuse(_request: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "send the cluster's token as metadata `authorization: Bearer TOKEN`",
            )

        self._refusal = grpc.unary_unary_rpc_method_handler(refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        if details.method.startswith("/grpc.health.v1.Health/"):
            return await continuation(details)
        shown = dict(details.invocation_metadata).get("authorization", "")
        shown_bytes = shown if isinstance(shown, bytes) else shown.encode()
        if hmac.compare_digest(shown_bytes, self._expected):
            return await continuation(details)
        return self._refusal


class Server:
    """A gRPC server with health and reflection; starts as NOT_SERVING."""

    def __init__(self, config: Config) -> None:
        token = config.token()
        self.grpc = grpc.aio.server(
            interceptors=[_TokenGuard(token)] if token else [],
            options=[
                *message_limits(config.max_message_bytes),
                *_KEEPALIVE,
                ("grpc.so_reuseport", 0),
            ],
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        self._services: list[str] = []
        self._listen = config.listen

    async def start(self, service_names: Sequence[str]) -> str:
        """Bind, serve, and return the bound HOST:PORT. Raises `ConfigError` if it cannot bind."""
        self._services = list(service_names)
        reflection.enable_server_reflection(
            (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc
        )
        host, _ = split_address(self._listen)
        await self.set_serving(False)
        try:
            port = self.grpc.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {self._listen}: is the port taken?") from error
        await self.grpc.start()
        return join_address(host, port)

    async def set_serving(self, serving: bool) -> None:
        """Set the health of the whole server and of each of its services."""
        for service in ("", *self._services):
            await self._health.set(service, SERVING if serving else NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(grace_s)


def auth_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Call metadata that shows the token, if there is one."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def open_channel(address: str, max_message_bytes: int) -> grpc.aio.Channel:
    """A channel inside the cluster: bounded messages, keepalive, quick reconnection."""
    return grpc.aio.insecure_channel(
        address,
        options=[
            *message_limits(max_message_bytes),
            *_KEEPALIVE,
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ],
    )


def status_code(code: Code) -> grpc.StatusCode:
    """Our code as gRPC's enum member."""
    return grpc.StatusCode[code.value]


async def abort_with(context: grpc.aio.ServicerContext, error: BatonError) -> None:
    """End a call with the status an error stands for. Does not return."""
    await context.abort(status_code(error.code), error.message)


def error_from_rpc(error: grpc.aio.AioRpcError) -> RemoteError:
    """What a peer's status means in our own words."""
    return remote_error(error.code().name, error.details() or error.code().name)
