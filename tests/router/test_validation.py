"""What the router refuses before any node hears of it, and the sentence it refuses with."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InvalidRequest, UnknownModel
from baton.sampling import SamplingParams, StopParams
from router.http_requests import ChatBody, CompletionBody, read_body
from router.validation import Ask, ChatTurn, check_ask, check_tokens, resolve_sampling, resolve_stop
from tests.router.samples import SPEC


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (Ask(None), "no input"),
        (Ask(""), "prompt is empty"),
        (Ask(()), "prompt is empty"),
        (Ask("x", request_id="i" * 129), "request_id"),
        (Ask("x", request_id="a\nb"), "request_id"),
        (Ask("x", max_tokens=0), "max_tokens is 0"),
        (Ask((ChatTurn("", "hello"),)), "message 0 has no role"),
    ],
)
def test_a_bad_ask_is_refused_by_name(ask: Ask, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        check_ask(ask, "letters")


def test_an_unknown_model_is_told_the_served_one() -> None:
    with pytest.raises(UnknownModel, match="'letters'"):
        check_ask(Ask("x", model="gpt"), "letters")
    check_ask(Ask("x", model="letters"), "letters")


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": 1.5},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
)
def test_sampling_out_of_range_is_refused_by_name(field: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(field))):
        resolve_sampling(Ask("x", **field), new_seed=1)


def test_absent_sampling_is_greedy_with_the_drawn_seed() -> None:
    assert resolve_sampling(Ask("x"), new_seed=5) == SamplingParams(seed=5)
    assert resolve_sampling(Ask("x", seed=0), new_seed=5).seed == 0


@pytest.mark.parametrize(
    ("token_ids", "sentence"),
    [
        ([], "empty once tokenised"),
        ([1, 256], "token id 256 at position 1 .* 0 to 255"),
        ([-1], "token id -1 at position 0"),
        ([1] * 64, "64 tokens and the model's context 64"),
    ],
)
def test_a_prompt_that_the_model_cannot_read_is_refused(
    token_ids: list[int], sentence: str
) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        check_tokens(token_ids, SPEC)


@given(st.integers(1, 63), st.one_of(st.none(), st.integers(1, 100)), st.integers(1, 100))
def test_an_answer_always_fits_the_context(
    prompt_tokens: int, max_tokens: int | None, default: int
) -> None:
    ask = Ask("x", max_tokens=max_tokens)
    try:
        stop = resolve_stop(ask, prompt_tokens, SPEC, default)
    except InvalidRequest:
        assert max_tokens is not None
        assert prompt_tokens + max_tokens > SPEC.context_length
        return
    assert stop.max_tokens >= 1
    assert prompt_tokens + stop.max_tokens <= SPEC.context_length
    assert max_tokens in (None, stop.max_tokens)


def test_ignore_eos_is_passed_on() -> None:
    assert resolve_stop(Ask("x", ignore_eos=True), 4, SPEC, 9) == StopParams(9, ignore_eos=True)


@pytest.mark.parametrize(
    "parameter",
    [
        {"n": 2},
        {"stop": "."},
        {"stop": ["."]},
        {"tools": [{"type": "function"}]},
        {"logprobs": True},
        {"logprobs": 0},
        {"response_format": {"type": "json_object"}},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -1},
        {"logit_bias": {"5": 1}},
        {"repetition_penalty": 1.1},
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(parameter: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"{next(iter(parameter))} is not supported"):
        read_body(CompletionBody, {"prompt": "x", **parameter})


def test_neutral_and_unknown_parameters_are_taken() -> None:
    neutral = {
        "n": 1,
        "stop": None,
        "tools": [],
        "logprobs": False,
        "response_format": {"type": "text"},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "user": "somebody",
        "temperature": None,
    }
    ask = read_body(CompletionBody, {"prompt": [1, 2], **neutral}).ask()
    assert ask == Ask((1, 2), temperature=1.0)


def test_chat_content_may_be_parts_and_the_newer_limit_wins() -> None:
    content = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    ask = read_body(ChatBody, {**body, "max_completion_tokens": 7, "temperature": 0}).ask()
    assert ask == Ask((ChatTurn("user", "Hello"),), temperature=0.0, max_tokens=7)


@pytest.mark.parametrize(
    ("kind", "content", "sentence"),
    [
        (CompletionBody, [], "JSON object"),
        (CompletionBody, {}, "prompt: Field required"),
        (CompletionBody, {"prompt": ["a", "b"]}, "batches are not supported"),
        (CompletionBody, {"prompt": [True]}, "list of token ids"),
        (CompletionBody, {"prompt": "x", "max_tokens": "9"}, "max_tokens: .*integer"),
        (CompletionBody, {"prompt": "x", "temperature": "hot"}, "temperature: .*number"),
        (ChatBody, {"messages": []}, "messages: "),
        (ChatBody, {"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        (ChatBody, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0"),
    ],
)
def test_a_body_of_the_wrong_shape_says_where(kind: type, content: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        read_body(kind, content)
