"""The text of an answer while it is being written.

A token is not a text: a character of several bytes can be split over several tokens, and a token
can lose its leading space where it comes first. `push` returns what no later token can change, and
`flush` the rest. What they return, joined, is what decoding all ids at once gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"  # a character cut short, or bytes that are none
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class TextStream:
    """Decodes one answer piece by piece.

    Text is settled by windows: `_context` are ids whose text went out last, `_pending` those whose
    text has not. They are decoded together, so that a token keeps the space that only the first
    token of a text loses, and what the context alone gives is cut off.

    `tokenizers.decoders.DecodeStream` does the same, but raises when a byte-fallback tokenizer
    (SentencePiece) meets bytes that are no UTF-8: one bad byte turns a whole run of byte tokens
    into U+FFFD, and it had sent some of that run already. Here a run waits for its end.

    The ids in `skipped` have no text: those of special tokens, as a rule.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: Set[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now and has not been returned yet; often empty."""
        # What is skipped must not part a run of byte tokens, so it is gone before all else.
        self._pending.extend(id for id in token_ids if id not in self._skipped)
        if not self._pending or self._ends_in_byte_token():
            return ""
        text = self._decode(self._context + self._pending)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._settle(text)

    def flush(self) -> str:
        """The rest of the text, whole or not. The stream is at its end then."""
        text = self._decode(self._context + self._pending)
        return self._settle(text)

    def _settle(self, text: str) -> str:
        new = text[len(self._context_text) :]
        alone = self._decode(self._pending)
        if alone:
            self._context, self._context_text = self._pending, alone
        else:  # it would not stand as a first token: a lone space, say
            self._context, self._context_text = self._context + self._pending, text
        self._pending = []
        return new

    def _ends_in_byte_token(self) -> bool:
        last = self._tokenizer.id_to_token(self._pending[-1])
        return last is None or _BYTE_TOKEN.fullmatch(last) is not None

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
