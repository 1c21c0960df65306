"""The replies of the HTTP door, in OpenAI's shapes. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from baton.errors import HTTP_STATUS, BatonError
from router.answer import Completed

Kind = Literal["completion", "chat"]

_ID_PREFIX: dict[Kind, str] = {"completion": "cmpl", "chat": "chatcmpl"}
_WHOLE_OBJECT: dict[Kind, str] = {"completion": "text_completion", "chat": "chat.completion"}
_CHUNK_OBJECT: dict[Kind, str] = {"completion": "text_completion", "chat": "chat.completion.chunk"}
_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True, slots=True)
class ReplyShape:
    """What every object of one reply says about itself. `created` is in Unix seconds."""

    kind: Kind
    request_id: str
    model: str
    created: int
    include_usage: bool = False

    def whole(self, text: str, completed: Completed) -> dict[str, Any]:
        """The reply to a request without streaming."""
        reply = self._object(_WHOLE_OBJECT[self.kind])
        content: dict[str, Any] = {"text": text}
        if self.kind == "chat":
            content = {"message": {"role": "assistant", "content": text}}
        reply["choices"] = [_choice(content, completed.finish_reason)]
        reply["usage"] = _usage(completed)
        return reply

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with, before any text."""
        if self.kind == "completion":
            return []
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None)]

    def piece(self, text: str) -> dict[str, Any]:
        content = {"text": text} if self.kind == "completion" else {"delta": {"content": text}}
        return self._chunk(content, None)

    def closing(self, completed: Completed) -> list[dict[str, Any]]:
        """What a stream ends with: why it ended and, where asked for, the usage."""
        content: dict[str, Any] = {"text": ""} if self.kind == "completion" else {"delta": {}}
        chunks = [self._chunk(content, completed.finish_reason)]
        if self.include_usage:
            last = self._object(_CHUNK_OBJECT[self.kind])
            chunks.append({**last, "choices": [], "usage": _usage(completed)})
        return chunks

    def _chunk(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        chunk = self._object(_CHUNK_OBJECT[self.kind])
        chunk["choices"] = [_choice(content, finish_reason)]
        if self.include_usage:
            chunk["usage"] = None
        return chunk

    def _object(self, name: str) -> dict[str, Any]:
        return {
            "id": f"{_ID_PREFIX[self.kind]}-{self.request_id}",
            "object": name,
            "created": self.created,
            "model": self.model,
        }


def _choice(content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def _usage(completed: Completed) -> dict[str, Any]:
    return {
        "prompt_tokens": completed.prompt_tokens,
        "completion_tokens": completed.completion_tokens,
        "total_tokens": completed.prompt_tokens + completed.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": completed.cached_tokens},
    }


def error_reply(error: BatonError) -> dict[str, Any]:
    """The body that reports an error."""
    return error_body(HTTP_STATUS[error.code], error.message, error.code.lower())


def error_body(status: int, message: str, code: str) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
