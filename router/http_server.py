"""The HTTP listener: uvicorn on the event loop that everything else runs on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from baton.config import join_address, split_address
from baton.errors import ConfigError

MAX_CONNECTIONS = 4096
BACKLOG = 1024
STOP_GRACE_S = 1


class _Uvicorn(uvicorn.Server):
    """Leaves the process's signals alone and says when it has begun."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class HttpServer:
    """Serves one application on exactly one address."""

    def __init__(self, app: Starlette, address: str) -> None:
        self._address = address
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                backlog=BACKLOG,
                timeout_graceful_shutdown=STOP_GRACE_S,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Bind, serve, and return the bound HOST:PORT. Raises `ConfigError` if it cannot bind."""
        host, port = split_address(self._address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen on {self._address}: {error.strerror}") from error
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        listening = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait([self._task, listening], return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            listening.cancel()
            self._task.result()
        return join_address(host, listener.getsockname()[1])

    async def stop(self) -> None:
        """Close the listener, let open replies end for a moment, then close them too."""
        if self._task is not None:
            self._server.should_exit = True
            await self._task
