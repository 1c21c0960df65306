"""The public gRPC door: messages in, `Ask`s to the frontend, updates and statuses out."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import grpc.aio
import structlog

from baton.errors import BatonError, Cancelled
from baton.rpc import abort_with
from baton.wire import finish_to_proto
from protos import inference_pb2, inference_pb2_grpc
from router.answer import Answer, Completed, Tokens
from router.frontend import Frontend
from router.validation import Ask, ChatTurn, Prompt

log = structlog.get_logger()

TIMING_KEY = "baton-timing"


class InferenceService(inference_pb2_grpc.InferenceServicer):
    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        try:
            ask = ask_from_proto(request)
            async with self._frontend.answer(ask, context.time_remaining()) as answer:
                # gRPC drops this generator without closing it when the client goes away.
                gone = Cancelled("the client went away")
                context.add_done_callback(lambda _: self._frontend.end(answer, gone))
                try:
                    async for update in answer.updates():
                        if isinstance(update, Completed):
                            _set_timing(context, answer)
                        yield _response(answer.request_id, update)
                except BatonError:
                    _set_timing(context, answer)
                    raise
        except BatonError as error:
            await abort_with(context, error)
        except grpc.aio.BaseError:
            raise  # the stream to the client broke, or was aborted
        except Exception as error:
            log.exception("request failed", request_id=request.request_id)
            await abort_with(context, BatonError(f"the router failed: {error!r}"))

    async def Abort(
        self, request: inference_pb2.AbortRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.AbortResponse:
        return inference_pb2.AbortResponse(found=self._frontend.abort(request.request_id))

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GetModelInfoResponse:
        spec = self._frontend.spec
        return inference_pb2.GetModelInfoResponse(
            name=spec.name,
            fingerprint=spec.fingerprint,
            architecture=spec.architecture,
            context_length=spec.context_length,
            vocabulary_size=spec.vocabulary_size,
            eos_token_ids=spec.eos_token_ids,
            has_chat_template=self._frontend.codec.has_chat_template,
        )


def ask_from_proto(request: inference_pb2.GenerateRequest) -> Ask:
    """The request in our own words; a field that is absent stays absent."""
    prompt: Prompt = None
    match request.WhichOneof("input"):
        case "text":
            prompt = request.text
        case "token_ids":
            prompt = tuple(request.token_ids.ids)
        case "chat":
            prompt = tuple(ChatTurn(m.role, m.content) for m in request.chat.messages)
    sampling, stop = request.sampling, request.stop
    return Ask(
        prompt=prompt,
        request_id=request.request_id,
        model=request.model,
        temperature=sampling.temperature if sampling.HasField("temperature") else None,
        top_k=sampling.top_k if sampling.HasField("top_k") else None,
        top_p=sampling.top_p if sampling.HasField("top_p") else None,
        min_p=sampling.min_p if sampling.HasField("min_p") else None,
        seed=sampling.seed if sampling.HasField("seed") else None,
        max_tokens=stop.max_tokens if stop.HasField("max_tokens") else None,
        ignore_eos=stop.ignore_eos,
        cache_salt=request.cache_salt,
    )


def _response(request_id: str, update: Tokens | Completed) -> inference_pb2.GenerateResponse:
    if isinstance(update, Tokens):
        chunk = inference_pb2.Chunk(
            index=update.index, token_ids=update.token_ids, text=update.text
        )
        return inference_pb2.GenerateResponse(request_id=request_id, chunk=chunk)
    complete = inference_pb2.Complete(
        finish_reason=finish_to_proto(update.finish_reason),
        prompt_tokens=update.prompt_tokens,
        completion_tokens=update.completion_tokens,
        seed=update.seed,
        cached_tokens=update.cached_tokens,
    )
    return inference_pb2.GenerateResponse(request_id=request_id, complete=complete)


def _set_timing(context: grpc.aio.ServicerContext, answer: Answer) -> None:
    context.set_trailing_metadata(((TIMING_KEY, json.dumps(answer.timing())),))
