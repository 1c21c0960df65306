"""Text to ids and back: as transformers does it, in pieces as in one go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InvalidRequest, UnsupportedModel
from baton.model import TextCodec
from tests.baton.model.test_gguf_tokenizer import sentencepiece
from tests.fixtures.prompts import PROMPTS, Prompt

EXPECTED = json.loads((Path(__file__).parents[2] / "fixtures" / "expected_tokens.json").read_text())


def with_template(folder: Path, template: object) -> Path:
    config = {"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def rendered(folder: Path, template: object, messages: Sequence[tuple[str, str]]) -> str:
    codec = TextCodec.load(with_template(folder, template), now=lambda: datetime(2024, 2, 29))
    return codec.decode(codec.encode_chat(messages), skip_special=False)


def in_pieces(codec: TextCodec, ids: Sequence[int], step: int) -> str:
    stream = codec.stream()
    parts = [stream.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    return "".join(parts) + stream.flush()


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.name)
def test_prompts_become_the_ids_that_transformers_makes(
    default_codec: TextCodec, prompt: Prompt
) -> None:
    wanted = next(item for item in EXPECTED["answers"] if item["name"] == prompt.name)
    if prompt.kind == "chat":
        assert default_codec.encode_chat(prompt.messages) == wanted["prompt_token_ids"]
    else:
        assert default_codec.encode(prompt.text) == wanted["prompt_token_ids"]


@pytest.mark.parametrize("item", EXPECTED["answers"], ids=lambda item: item["name"])
def test_answers_streamed_by_token_read_as_decoded_at_once(
    default_codec: TextCodec, item: dict[str, list[int]]
) -> None:
    ids = item["token_ids"]
    assert in_pieces(default_codec, ids, 1) == default_codec.decode(ids)


@given(
    ids=st.lists(st.one_of(st.integers(0, 49151), st.integers(0, 400), st.integers(0, 16))),
    step=st.integers(1, 4),
)
def test_stream_of_any_ids_reads_as_decoded_at_once(
    default_codec: TextCodec, ids: list[int], step: int
) -> None:
    assert in_pieces(default_codec, ids, step) == default_codec.decode(ids)


SENTENCEPIECE = TextCodec(sentencepiece(), None, {})


@given(
    ids=st.lists(st.one_of(st.integers(0, 300), st.integers(255, 276), st.sampled_from([1, 259]))),
    step=st.integers(1, 4),
)
def test_stream_of_any_byte_fallback_ids_reads_as_decoded_at_once(
    ids: list[int], step: int
) -> None:
    assert in_pieces(SENTENCEPIECE, ids, step) == SENTENCEPIECE.decode(ids)


# The default model has no token for some bytes, among them control characters and the lead bytes
# of unassigned planes; its tokenizer drops those in transformers too.
@given(st.text(st.characters(codec="utf-8", min_codepoint=32, max_codepoint=0x3FFFF)))
def test_any_text_comes_back(default_codec: TextCodec, text: str) -> None:
    assert default_codec.decode(default_codec.encode(text), skip_special=False) == text


def test_split_character_waits_for_its_last_byte(default_codec: TextCodec) -> None:
    ids = default_codec.encode("👩‍🚀")
    stream = default_codec.stream()
    pushed = [stream.push([token_id]) for token_id in ids]
    assert "" in pushed
    assert not any("\ufffd" in text for text in pushed)
    assert "".join(pushed) == "👩‍🚀"
    assert stream.flush() == ""


def test_character_that_never_ends_is_flushed(default_codec: TextCodec) -> None:
    stream = default_codec.stream()
    assert stream.push(default_codec.encode("🚀")[:1]) == ""
    assert stream.flush() == "\ufffd"


def test_messages_may_be_pairs_or_mappings(default_codec: TextCodec) -> None:
    pairs = default_codec.encode_chat([("user", "hi")])
    assert pairs == default_codec.encode_chat([{"role": "user", "content": "hi"}])


def test_model_without_template_takes_text_only(tiny_folder: Path) -> None:
    codec = TextCodec.load(tiny_folder)
    assert not codec.has_chat_template
    with pytest.raises(InvalidRequest, match="send the prompt as text"):
        codec.encode_chat([("user", "hi")])


def test_template_sees_what_transformers_shows_it(tiny_folder: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'skip' %}{% continue %}"
        "{% endif %}\n{{ m | tojson }}{% endfor %}"
        "{{ strftime_now('%d %b %Y') }}{% if add_generation_prompt %}>{% endif %}"
    )
    text = rendered(tiny_folder, template, [("skip", ""), ("user", "<é>")])
    assert text == '<s>\n{"role": "user", "content": "<é>"}29 Feb 2024>'.replace("\n", "", 1)


def test_default_is_taken_of_several_templates(tiny_folder: Path) -> None:
    templates = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    assert rendered(tiny_folder, templates, []) == "d"


def test_template_in_its_own_file_comes_first(tiny_folder: Path) -> None:
    (tiny_folder / "chat_template.jinja").write_text("file")
    assert rendered(tiny_folder, "config", []) == "file"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].content + nothing }}", "nothing"),
        ("{{ messages.append(1) }}", "unsafe|immutable|not safely"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|__class__"),
        ("{{ 1 + messages }}", "unsupported operand"),
    ],
)
def test_template_that_refuses_says_why(tiny_folder: Path, template: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        rendered(tiny_folder, template, [("user", "hi")])


def test_broken_template_is_refused_at_load(tiny_folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no jinja"):
        TextCodec.load(with_template(tiny_folder, "{% for %}"))


def test_broken_tokenizer_is_refused_at_load(tiny_folder: Path) -> None:
    (tiny_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        TextCodec.load(tiny_folder)


def test_half_a_surrogate_pair_is_an_invalid_request(default_codec: TextCodec) -> None:
    with pytest.raises(InvalidRequest, match="character 2"):
        default_codec.encode("ab\ud83d")
