"""The bodies of the HTTP door: which parameters it takes, ignores and refuses. Pure.

The shapes are OpenAI's. A parameter that would change the answer and is not supported is refused by
name, unless its value asks for nothing; any other unknown one is ignored.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from baton.errors import InvalidRequest
from router.validation import Ask, ChatTurn

DEFAULT_TEMPERATURE = 1.0  # OpenAI's; the gRPC door's is 0

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stop": ([], ""),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "min_tokens": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
"""Unsupported parameters, and the values besides null with which they may be sent all the same."""


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Body):
    include_usage: bool | None = None


class _Generation(_Body):
    """What both kinds of request have in common."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_fields(self) -> dict[str, Any]:
        """The fields of an `Ask` that do not depend on the kind of request."""
        temperature = DEFAULT_TEMPERATURE if self.temperature is None else self.temperature
        top_k = 0 if self.top_k == -1 else self.top_k  # -1 keeps all elsewhere
        return {
            "model": self.model or "",
            "temperature": temperature,
            "top_p": self.top_p,
            "top_k": top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "ignore_eos": bool(self.ignore_eos),
            "cache_salt": self.cache_salt or "",
        }


class CompletionBody(_Generation):
    """POST /v1/completions."""

    prompt: str | tuple[int, ...]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> str | tuple[int, ...]:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and all(type(item) is int for item in value):
            return tuple(value)
        raise ValueError("send one string or one list of token ids; batches are not supported")

    def ask(self) -> Ask:
        return Ask(prompt=self.prompt, **self.sampling_fields())


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: str
    content: str | list[TextPart]

    def turn(self) -> ChatTurn:
        if isinstance(self.content, str):
            return ChatTurn(self.role, self.content)
        return ChatTurn(self.role, "".join(part.text for part in self.content))


class ChatBody(_Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None

    def ask(self) -> Ask:
        fields = self.sampling_fields()
        if self.max_completion_tokens is not None:
            fields["max_tokens"] = self.max_completion_tokens
        return Ask(prompt=tuple(message.turn() for message in self.messages), **fields)


Body = CompletionBody | ChatBody


def read_body(kind: type[Body], content: Any) -> Body:
    """A parsed JSON body as a request. Raises `InvalidRequest` naming what to change."""
    if not isinstance(content, dict):
        raise InvalidRequest("the body must be a JSON object")
    for name, neutral in NEUTRAL_VALUES.items():
        value = content.get(name)
        if value is not None and not any(_same(value, allowed) for allowed in neutral):
            raise InvalidRequest(f"{name} is not supported; leave it out")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InvalidRequest(_explain(error)) from error


def _same(value: Any, allowed: Any) -> bool:
    """Equality that tells `false` from 0, as JSON does."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[TextPart]"))
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"
