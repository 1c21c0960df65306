"""From what a client asked to what the nodes are told, or what the client should change. Pure.

Both doors, gRPC and HTTP, build an `Ask`; everything after that is the same for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import InvalidRequest, UnknownModel
from baton.ids import MAX_REQUEST_ID_LENGTH
from baton.model.spec import ModelSpec
from baton.sampling import SamplingParams, StopParams, validate_sampling

MAX_SALT_LENGTH = 256


@dataclass(frozen=True, slots=True)
class ChatTurn:
    role: str
    content: str


Prompt = str | tuple[int, ...] | tuple[ChatTurn, ...] | None


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as its client put it. None stands for what was left out."""

    prompt: Prompt
    request_id: str = ""
    model: str = ""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    ignore_eos: bool = False
    cache_salt: str = ""


def check_ask(ask: Ask, served_model: str) -> None:
    """Refuse what can be refused before the prompt is tokenised."""
    if ask.model not in ("", served_model):
        raise UnknownModel(f"the model {ask.model!r} is not served here; ask for {served_model!r}")
    if len(ask.request_id) > MAX_REQUEST_ID_LENGTH or not ask.request_id.isprintable():
        raise InvalidRequest(
            f"request_id must be at most {MAX_REQUEST_ID_LENGTH} printable characters, or empty"
        )
    if len(ask.cache_salt) > MAX_SALT_LENGTH:
        raise InvalidRequest(f"cache_salt must have at most {MAX_SALT_LENGTH} characters")
    if ask.prompt is None:
        raise InvalidRequest("the request has no input; send text, token_ids or chat")
    if not ask.prompt:
        raise InvalidRequest("the prompt is empty; send at least one token")
    for position, turn in enumerate(ask.prompt if isinstance(ask.prompt, tuple) else ()):
        if isinstance(turn, ChatTurn) and not turn.role:
            raise InvalidRequest(f"message {position} has no role; send user, assistant or system")
    if ask.max_tokens is not None and ask.max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {ask.max_tokens}; send 1 or more")


def resolve_sampling(ask: Ask, new_seed: int) -> SamplingParams:
    """The sampling parameters with defaults filled in. `new_seed` serves where none is given."""
    default = SamplingParams()
    return validate_sampling(
        SamplingParams(
            temperature=default.temperature if ask.temperature is None else ask.temperature,
            top_k=default.top_k if ask.top_k is None else ask.top_k,
            top_p=default.top_p if ask.top_p is None else ask.top_p,
            min_p=default.min_p if ask.min_p is None else ask.min_p,
            seed=new_seed if ask.seed is None else ask.seed,
        )
    )


def check_tokens(token_ids: Sequence[int], spec: ModelSpec) -> None:
    """Refuse a prompt that the model cannot read."""
    if not token_ids:
        raise InvalidRequest("the prompt is empty once tokenised; send at least one token")
    if len(token_ids) >= spec.context_length:
        raise InvalidRequest(
            f"the prompt has {len(token_ids)} tokens and the model's context {spec.context_length};"
            " shorten the prompt so that an answer fits"
        )
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < spec.vocabulary_size:
            raise InvalidRequest(
                f"token id {token_id} at position {position} is not in the vocabulary; "
                f"send ids from 0 to {spec.vocabulary_size - 1}"
            )


def resolve_stop(
    ask: Ask, prompt_tokens: int, spec: ModelSpec, default_max_tokens: int
) -> StopParams:
    """When the answer ends: what was asked, or the default bounded by the context."""
    room = spec.context_length - prompt_tokens
    if ask.max_tokens is None:
        return StopParams(min(default_max_tokens, room), ask.ignore_eos)
    if ask.max_tokens > room:
        raise InvalidRequest(
            f"{prompt_tokens} prompt tokens and max_tokens {ask.max_tokens} exceed the model's "
            f"context of {spec.context_length}; lower max_tokens to {room} or less"
        )
    return StopParams(ask.max_tokens, ask.ignore_eos)
