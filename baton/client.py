"""The public Python client: a prompt in, the answer token by token out.

    async with AsyncClient("127.0.0.1:7000") as client:
        async for update in client.generate([("user", "Hello")], Options(max_tokens=32)):
            ...  # Chunk, Chunk, …, and one Completion

A prompt is text (sent as it is), token ids, or (role, content) messages (the model's chat template
is applied). What fails raises a `BatonError` with the router's own sentence; a request that had
begun raises `RequestFailed`, which has its timing record too. `Client` is the same without asyncio.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.errors import BatonError, Code, DeadlineExceeded, RemoteError
from baton.rpc import SERVING, auth_metadata, error_from_rpc, message_limits, open_channel
from baton.sampling import FinishReason
from baton.wire import finish_from_proto
from protos import common_pb2, inference_pb2, inference_pb2_grpc

TIMING_KEY = "baton-timing"
MAX_MESSAGE_BYTES = 4 << 20

Prompt = str | Sequence[int] | Sequence[tuple[str, str]]
Timing = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """How to answer. None leaves a choice to the router: greedy, and its own max_tokens."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    ignore_eos: bool = False
    cache_salt: str = ""
    request_id: str = ""
    model: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of the answer; `index` is that of the first."""

    index: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """How the answer ended. `timing` holds seconds since the router received the request.

    `cached_tokens` of the prompt were not computed for it: they were there from another.
    """

    request_id: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    seed: int
    cached_tokens: int = 0
    timing: Timing = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    fingerprint: str
    architecture: str
    context_length: int
    vocabulary_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


class RequestFailed(RemoteError):
    """A request that did not end well, with the timing record of how far it came."""

    def __init__(self, code: Code, message: str, timing: Timing) -> None:
        super().__init__(code, message)
        self.timing = timing


class AsyncClient:
    """A channel to one router. Close it, or use it as a context manager."""

    def __init__(self, address: str, token: str | None = None) -> None:
        self._channel = open_channel(address, MAX_MESSAGE_BYTES)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._metadata = auth_metadata(token)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(
        self, prompt: Prompt, options: Options | None = None
    ) -> AsyncIterator[Chunk | Completion]:
        """Stream an answer. Closing the iterator early cancels the request."""
        options = options or Options()
        call = self._stub.Generate(
            _request(prompt, options), metadata=self._metadata, timeout=options.timeout_s
        )
        try:
            async for response in call:
                if response.WhichOneof("response") == "chunk":
                    yield _chunk(response.chunk)
                else:
                    yield _completion(response, _timing(await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            raise _failure(error) from error
        finally:
            call.cancel()

    async def abort(self, request_id: str) -> bool:
        """End a request by its id; False if none such is running."""
        request = inference_pb2.AbortRequest(request_id=request_id)
        try:
            return bool((await self._stub.Abort(request, metadata=self._metadata)).found)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def model_info(self) -> ModelInfo:
        request = inference_pb2.GetModelInfoRequest()
        try:
            return _model_info(await self._stub.GetModelInfo(request, metadata=self._metadata))
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until the router can serve a request. Raises `DeadlineExceeded`."""
        watch = health_pb2_grpc.HealthStub(self._channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True
        )
        try:
            async for answer in watch:
                if answer.status == SERVING:
                    return
        except grpc.aio.AioRpcError as error:
            raise _not_ready(error, timeout_s) from error
        finally:
            watch.cancel()
        raise DeadlineExceeded("the router stopped before it could serve")


class Client:
    """`AsyncClient` for code without an event loop."""

    def __init__(self, address: str, token: str | None = None) -> None:
        options = [*message_limits(MAX_MESSAGE_BYTES), ("grpc.enable_http_proxy", 0)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._metadata = auth_metadata(token)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def generate(
        self, prompt: Prompt, options: Options | None = None
    ) -> Iterator[Chunk | Completion]:
        """Stream an answer. Closing the iterator early cancels the request."""
        options = options or Options()
        call = self._stub.Generate(
            _request(prompt, options), metadata=self._metadata, timeout=options.timeout_s
        )
        try:
            for response in call:
                if response.WhichOneof("response") == "chunk":
                    yield _chunk(response.chunk)
                else:
                    yield _completion(response, _timing(call.trailing_metadata()))
        except grpc.RpcError as error:
            raise _failure(error) from error
        finally:
            call.cancel()

    def model_info(self) -> ModelInfo:
        request = inference_pb2.GetModelInfoRequest()
        try:
            return _model_info(self._stub.GetModelInfo(request, metadata=self._metadata))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the router can serve a request. Raises `DeadlineExceeded`."""
        watch = health_pb2_grpc.HealthStub(self._channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True
        )
        try:
            for answer in watch:
                if answer.status == SERVING:
                    return
        except grpc.RpcError as error:
            raise _not_ready(error, timeout_s) from error
        finally:
            watch.cancel()
        raise DeadlineExceeded("the router stopped before it could serve")


def _request(prompt: Prompt, options: Options) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(
        request_id=options.request_id,
        model=options.model,
        sampling=common_pb2.SamplingParams(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed,
        ),
        stop=common_pb2.StopParams(max_tokens=options.max_tokens, ignore_eos=options.ignore_eos),
        cache_salt=options.cache_salt,
    )
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], tuple):
        for role, content in prompt:  # type: ignore[misc]
            request.chat.messages.add(role=role, content=content)
    else:
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
    return request


def _chunk(chunk: inference_pb2.Chunk) -> Chunk:
    return Chunk(chunk.index, tuple(chunk.token_ids), chunk.text)


def _completion(response: inference_pb2.GenerateResponse, timing: Timing) -> Completion:
    complete = response.complete
    return Completion(
        response.request_id,
        finish_from_proto(complete.finish_reason),
        complete.prompt_tokens,
        complete.completion_tokens,
        complete.seed,
        complete.cached_tokens,
        timing,
    )


def _model_info(response: inference_pb2.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        response.name,
        response.fingerprint,
        response.architecture,
        response.context_length,
        response.vocabulary_size,
        tuple(response.eos_token_ids),
        response.has_chat_template,
    )


def _timing(metadata: Any) -> Timing:
    for key, value in metadata or ():
        if key == TIMING_KEY:
            return dict(json.loads(value))
    return {}


def _failure(error: Any) -> BatonError:
    meant = error_from_rpc(error)
    return RequestFailed(meant.code, meant.message, _timing(error.trailing_metadata()))


def _not_ready(error: Any, timeout_s: float) -> BatonError:
    meant = error_from_rpc(error)
    if meant.code is Code.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"the router could not serve within {timeout_s:g} s")
    return meant
