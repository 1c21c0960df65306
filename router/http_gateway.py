"""The HTTP door, in OpenAI's shapes: JSON in, JSON or server-sent events out.

    GET  /health                the process answers
    GET  /ready                 200 while a request could be served, else 503
    GET  /v1/models             the one model that is served
    POST /v1/completions, /v1/chat/completions

A request here goes the same way as one over gRPC. Nothing is answered before its first token, so a
request that fails before that gets the status of its failure; after it, an `error` event. A client
that hangs up ends its request on both nodes.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from baton.errors import HTTP_STATUS, BatonError, InvalidRequest, Unauthenticated
from router.answer import Answer, Completed, Update
from router.frontend import Frontend
from router.http_replies import Kind, ReplyShape, error_body, error_reply
from router.http_requests import Body, ChatBody, CompletionBody, read_body

log = structlog.get_logger()

TIMING_HEADER = "baton-timing"
_BODIES: dict[Kind, type[Body]] = {"completion": CompletionBody, "chat": ChatBody}


def make_app(
    frontend: Frontend,
    ready: Callable[[], bool],
    max_body_bytes: int,
    token: str | None,
) -> Starlette:
    """The door as an ASGI application. `ready` says whether a request could be served now."""
    gateway = _Gateway(frontend, ready, max_body_bytes, token)
    return Starlette(
        routes=[
            Route("/health", gateway.health),
            Route("/ready", gateway.ready),
            Route("/v1/models", gateway.models),
            Route("/v1/completions", gateway.completions, methods=["POST"]),
            Route("/v1/chat/completions", gateway.chat, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _on_http_exception, BatonError: _on_error},
    )


class _Gateway:
    def __init__(
        self,
        frontend: Frontend,
        ready: Callable[[], bool],
        max_body_bytes: int,
        token: str | None,
    ) -> None:
        self._frontend = frontend
        self._ready = ready
        self._max_body_bytes = max_body_bytes
        self._expected = f"Bearer {token}".encode() if token else None
        self._started_at = int(time.time())

    async def health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        if self._ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "no prefill and decode node"}, 503)

    async def models(self, request: Request) -> Response:
        self._check_token(request)
        model = {
            "id": self._frontend.spec.name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "baton",
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        return await self._generate("completion", request)

    async def chat(self, request: Request) -> Response:
        return await self._generate("chat", request)

    async def _generate(self, kind: Kind, request: Request) -> Response:
        self._check_token(request)
        body = read_body(_BODIES[kind], _parse(await self._read(request)))
        return _Generation(self._frontend, kind, body)

    def _check_token(self, request: Request) -> None:
        shown = request.headers.get("authorization", "").encode()
        if self._expected is not None and not hmac.compare_digest(shown, self._expected):
            raise Unauthenticated("send the cluster's token as `Authorization: Bearer TOKEN`")

    async def _read(self, request: Request) -> bytes:
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > self._max_body_bytes:
                raise HTTPException(
                    413, f"the body exceeds {self._max_body_bytes} bytes; send a shorter prompt"
                )
        return bytes(content)


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is no JSON: {error}") from error


class _Generation(Response):
    """The reply to one request: it runs while the client is there."""

    def __init__(self, frontend: Frontend, kind: Kind, body: Body) -> None:
        super().__init__()
        self._frontend = frontend
        self._kind = kind
        self._body = body
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def begin(reply: Response) -> None:
            self._begun = True
            await reply(scope, receive, send)

        await _while_connected(receive, self._run(begin, send))

    async def _run(self, begin: Callable[[Response], Awaitable[None]], send: Send) -> None:
        """Answer with exactly one whole reply, stream or error."""
        try:
            async with self._frontend.answer(self._body.ask(), None) as answer:
                shape = ReplyShape(
                    self._kind,
                    answer.request_id,
                    self._frontend.spec.name,
                    int(time.time()),
                    self._body.include_usage,
                )
                if self._body.stream:
                    await self._stream(answer, shape, send)
                else:
                    await begin(await _collect(answer, shape))
        except BatonError as error:
            await self._fail(error, begin, send)
        except Exception as error:
            log.exception("request failed")
            await self._fail(BatonError(f"the router failed: {error!r}"), begin, send)

    async def _stream(self, answer: Answer, shape: ReplyShape, send: Send) -> None:
        updates = answer.updates()
        first = await anext(updates)
        self._begun = True
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in shape.opening():
            await _send_event(send, chunk)
        async for update in _chain(first, updates):
            if isinstance(update, Completed):
                for chunk in shape.closing(update):
                    await _send_event(send, chunk)
            elif update.text:
                await _send_event(send, shape.piece(update.text))
        await _end_events(send)

    async def _fail(
        self, error: BatonError, begin: Callable[[Response], Awaitable[None]], send: Send
    ) -> None:
        if not self._begun:
            await begin(_error_response(error))
        elif self._body.stream:
            await _send_event(send, error_reply(error))
            await _end_events(send)


async def _collect(answer: Answer, shape: ReplyShape) -> Response:
    texts: list[str] = []
    async for update in answer.updates():
        if isinstance(update, Completed):
            headers = {TIMING_HEADER: json.dumps(answer.timing())}
            return JSONResponse(shape.whole("".join(texts), update), headers=headers)
        texts.append(update.text)
    raise AssertionError("an answer ends with Completed or an error")


async def _chain(first: Update, rest: AsyncIterator[Update]) -> AsyncIterator[Update]:
    yield first
    async for update in rest:
        yield update


async def _send_event(send: Send, content: dict[str, Any]) -> None:
    line = f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
    await send({"type": "http.response.body", "body": line.encode(), "more_body": True})


async def _end_events(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _while_connected(receive: Receive, work: Any) -> None:
    """Run `work` until it is done or the client hangs up, then leave nothing running."""

    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(hang_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _error_response(error: BatonError) -> Response:
    status = HTTP_STATUS[error.code]
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse(error_reply(error), status, headers)


async def _on_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, BatonError)
    return _error_response(error)


async def _on_http_exception(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reply = error_body(error.status_code, error.detail, str(error.status_code))
    return JSONResponse(reply, error.status_code, error.headers)
