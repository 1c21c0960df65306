"""SentencePiece vocabularies out of GGUF, and the splits by name."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from baton.errors import UnsupportedModel
from baton.model.gguf_tokenizer import build_tokenizer

BYTES = [f"<0x{value:02X}>" for value in range(256)]
PIECES = ["▁", "a", "b", "e", "h", "l", "o", "w", "é", "▁h", "el", "lo", "▁w", "c", "bc", "ab"]


def sentencepiece(**changes: Any) -> Tokenizer:
    """A small SentencePiece tokenizer; a piece that stands earlier in PIECES scores better."""
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES, *PIECES],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(PIECES))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer, _ = build_tokenizer(metadata | changes)
    return tokenizer


def byte_level(pre: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*alphabet, "<s>"],
        "tokenizer.ggml.token_type": [1] * 256 + [3],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 256,
    }
    tokenizer, _ = build_tokenizer(metadata)
    return tokenizer


def test_best_scored_pieces_are_joined_first() -> None:
    tokens = sentencepiece().encode("hello abc", add_special_tokens=False).tokens
    assert tokens == ["▁h", "el", "lo", "▁", "a", "bc"]


def test_characters_without_a_piece_become_bytes_and_come_back() -> None:
    tokenizer = sentencepiece()
    encoded = tokenizer.encode("hello 日")
    assert encoded.tokens[0] == "<s>"
    assert encoded.tokens[-3:] == ["<0xE6>", "<0x97>", "<0xA5>"]
    assert tokenizer.decode(encoded.ids) == "hello 日"


def test_leading_space_is_added_only_where_the_file_says_so() -> None:
    tokenizer = sentencepiece(**{"tokenizer.ggml.add_space_prefix": False})
    encoded = tokenizer.encode("hello", add_special_tokens=False)
    assert encoded.tokens == ["h", "el", "lo"]
    assert tokenizer.decode(encoded.ids) == "hello"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", "Ġ12345", "!", "Ċ", "Ċ", "x"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "!", "Ċ", "Ċ", "x"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", "!ĊĊ", "x"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "!ĊĊ", "x"]),
    ],
)
def test_text_is_split_as_the_family_does(pre: str, pieces: list[str]) -> None:
    splitter = byte_level(pre).pre_tokenizer
    assert [piece for piece, _ in splitter.pre_tokenize_str("It's 12345!\n\nx")] == pieces


def test_llama_3_begins_text_with_bos_without_being_told() -> None:
    assert byte_level("llama-bpe").encode("a").tokens == ["<s>", "a"]
    assert byte_level("smollm").encode("a").tokens == ["a"]


def test_unknown_kind_of_tokenizer_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="'t5'"):
        sentencepiece(**{"tokenizer.ggml.model": "t5"})


def test_bos_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="bos_token_id 9999"):
        sentencepiece(**{"tokenizer.ggml.bos_token_id": 9999})
