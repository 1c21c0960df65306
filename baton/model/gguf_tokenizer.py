"""Rebuilds the tokenizer that a GGUF file describes, as `tokenizer.json` and its config.

A GGUF file keeps the vocabulary, and the merges or scores; how text is cut up before the merges
apply it only names (`tokenizer.ggml.pre`). The names known here are in `_PRE_TOKENIZERS`. One that
is not is refused: a wrong split still yields tokens, only worse answers, which nobody would trace
back to this place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from baton.errors import UnsupportedModel

_SPACE = "▁"  # U+2581, SentencePiece's visible space


class _TokenType(IntEnum):
    """`llama_token_type` in llama.cpp."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How text is cut up before merging, and what the family does beside it."""

    split: Callable[[], Any]
    normalizer: Callable[[], Any] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


def _split_by(pattern: str) -> Callable[[], Any]:
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2_split() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm_split() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _words_and_digits(digits: str) -> str:
    """The split of the GPT-4 family; its members differ in how many digits stay together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA_BPE = _PreTokenizer(
    _split_by(_words_and_digits(r"\p{N}{1,3}")), ignore_merges=True, add_bos=True
)
_PRE_TOKENIZERS: dict[str, _PreTokenizer] = {
    "default": _PreTokenizer(_gpt2_split),
    "gpt-2": _PreTokenizer(_gpt2_split),
    "smollm": _PreTokenizer(_smollm_split),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "qwen2": _PreTokenizer(_split_by(_words_and_digits(r"\p{N}")), normalizer=normalizers.NFC),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the content of `tokenizer_config.json` from a GGUF file's metadata.

    Raises `UnsupportedModel` for a kind of tokenizer, or a split, that is not known here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens: list[str] | None = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UnsupportedModel("the GGUF file carries no vocabulary (tokenizer.ggml.tokens)")
    if len(set(tokens)) != len(tokens):
        raise UnsupportedModel("the GGUF file's vocabulary names some token twice")
    types = metadata.get("tokenizer.ggml.token_type") or [_TokenType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise UnsupportedModel("the GGUF file's token_type and tokens differ in length")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(metadata, tokens, types)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(metadata, tokens, types)
    else:
        raise UnsupportedModel(
            f"the GGUF file's tokenizer is {kind!r} (tokenizer.ggml.model); supported are 'gpt2' "
            "and 'llama'"
        )
    _add_special_tokens(tokenizer, tokens, types)
    config = _tokenizer_config(metadata, tokens)
    # tokenizer.ggml.add_eos_token is left aside: a prompt to be continued never ends the text.
    if metadata.get("tokenizer.ggml.add_bos_token", add_bos):
        _prepend_bos(tokenizer, config.get("bos_token"))
    return tokenizer, config


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"the GGUF file's text split is {name!r} (tokenizer.ggml.pre); supported are "
            + ", ".join(sorted(_PRE_TOKENIZERS))
        )
    pre = _PRE_TOKENIZERS[name]
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise UnsupportedModel("the GGUF file carries no merges (tokenizer.ggml.merges)")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=_vocabulary(tokens, types),
            merges=[_pair(merge) for merge in merges],
            ignore_merges=pre.ignore_merges,
        )
    )
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer()
    tokenizer.pre_tokenizer = pre.split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _pair(merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not separator:
        raise UnsupportedModel(f"the GGUF file's merge {merge!r} is no pair")
    return left, right


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tuple[Tokenizer, bool]:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise UnsupportedModel("the GGUF file has no score per token (tokenizer.ggml.scores)")
    pieces = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind == _TokenType.NORMAL
    }
    tokenizer = Tokenizer(
        models.BPE(
            vocab=_vocabulary(tokens, types),
            merges=_merges_from_scores(pieces, {token: id for id, token in enumerate(tokens)}),
            unk_token=_token(metadata, tokens, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    visible_spaces = normalizers.Replace(" ", _SPACE)
    decoding: list[Any] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), visible_spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = visible_spaces
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer, True


def _merges_from_scores(pieces: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first.

    SentencePiece keeps no merges: it joins the neighbours whose union scores best. The order is
    that of `SentencePieceExtractor` in transformers, ties included.
    """
    merges: list[tuple[str, str, float]] = []
    for piece, score in pieces.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in pieces and pair[1] in pieces]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges.extend((left, right, score) for left, right in known)
    merges.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    return [(left, right) for left, right, _ in merges]


def _vocabulary(tokens: list[str], types: list[int]) -> dict[str, int]:
    """Token to id, without the padding that some files fill their embedding's rows with."""
    return {
        token: id
        for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != _TokenType.UNUSED
    }


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Make control and user-defined tokens whole words, as chat templates write them."""
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != _TokenType.USER_DEFINED)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_TokenType.CONTROL, _TokenType.UNKNOWN, _TokenType.USER_DEFINED)
        ]
    )


def _tokenizer_config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := _token(metadata, tokens, name)) is not None:
            config[f"{key}_token"] = token
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _token(metadata: Mapping[str, Any], tokens: list[str], name: str) -> str | None:
    id: int | None = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if id is None:
        return None
    if not 0 <= id < len(tokens):
        raise UnsupportedModel(f"the GGUF file's {name}_token_id {id} is outside its vocabulary")
    return tokens[id]


def _prepend_bos(tokenizer: Tokenizer, bos: str | None) -> None:
    if bos is None:
        raise UnsupportedModel("the GGUF file asks for a BOS token before text and names none")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
