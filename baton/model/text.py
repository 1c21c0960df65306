"""Text to token ids and back.

One `TextCodec` serves every request of a process and may be used by many threads at once: nothing
in it changes after `load`. A `TextStream` belongs to one answer and to one thread at a time.

A chat template is a program that comes with the model, so it runs in jinja's sandbox: it can format
messages and refuse them, and reach nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from baton.errors import InvalidRequest, UnsupportedModel
from baton.model.folder import (
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    read_json_if_present,
)
from baton.model.text_stream import TextStream

Message = Mapping[str, str] | tuple[str, str]


class TextCodec:
    """A model's tokenizer and chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: jinja2.Template | None,
        special_tokens: Mapping[str, str],
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special_tokens = dict(special_tokens)
        self._special_ids = frozenset(
            id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def load(cls, folder: Path, now: Callable[[], datetime] = datetime.now) -> TextCodec:
        """Read the tokenizer and template in `folder`. Raises `UnsupportedModel`.

        `now` is what a template that writes today's date is told.
        """
        try:
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # tokenizers raises bare Exception, and for every reason
            raise UnsupportedModel(
                f"{folder / TOKENIZER_FILE} cannot be read: {error}; fetch the model again"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = read_json_if_present(folder, TOKENIZER_CONFIG_FILE)
        return cls(tokenizer, _load_template(folder, config, now), _special_tokens(config))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, with BOS before it where the tokenizer itself puts one.

        The spelling of a special token counts as that token, as it does in transformers.
        """
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation in the model's own format, up to where its answer begins.

        A message has a role and a content, in a mapping or as a pair. Raises `InvalidRequest`
        where the model has no chat template or its template refuses the conversation.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template; send the prompt as text")
        plain = [
            {"role": message[0], "content": message[1]}
            if isinstance(message, tuple)
            else dict(message)
            for message in messages
        ]
        try:
            rendered = self._template.render(
                messages=plain, add_generation_prompt=True, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            # Not only TemplateError: a template is code, and trips over what it did not expect.
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}"
            ) from error
        return self._encode(rendered, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`. What is not valid UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder for one answer, token by token."""
        return TextStream(self._tokenizer, self._special_ids if skip_special else frozenset())

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text holds half of a surrogate pair at character {error.start}; send UTF-8"
            ) from error
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The variables bos_token, eos_token, ... that templates use; a token may be an object."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _load_template(
    folder: Path, config: Mapping[str, Any], now: Callable[[], datetime]
) -> jinja2.Template | None:
    """From chat_template.jinja, else from the tokenizer's config: one text, or several by name."""
    file = folder / TEMPLATE_FILE
    try:
        source = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
        if isinstance(source, list):
            source = {item["name"]: item["template"] for item in source}.get("default")
        return None if source is None else _environment(now).from_string(source)
    except (OSError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise UnsupportedModel(f"the chat template in {folder} cannot be read: {error}") from error
    except jinja2.TemplateError as error:
        raise UnsupportedModel(f"the chat template in {folder} is no jinja: {error}") from error


def _environment(now: Callable[[], datetime]) -> jinja2.Environment:
    """What chat templates may use: the set that transformers gives them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    """Plain JSON: jinja's own filter escapes for HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
