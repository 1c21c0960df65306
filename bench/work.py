"""What a step has to do: operations and bytes, counted from a model's shape alone. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from baton.model.spec import ModelSpec

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Work:
    """The least that any implementation must compute and read."""

    flops: int
    bytes_read: int


def matrix_weights(spec: ModelSpec) -> int:
    """Weights of all layers' matrices, without embedding and head."""
    heads = (spec.query_heads + 2 * spec.kv_heads) * spec.head_dim
    attention = spec.hidden_size * (heads + spec.query_heads * spec.head_dim)
    return spec.layers * (attention + 3 * spec.hidden_size * spec.intermediate_size)


def prefill(spec: ModelSpec, tokens: int) -> Work:
    """A whole prompt; logits of its last token only.

    Two operations for each weight and token; scores and their sum over values cost two each for
    each pair of tokens that causal attention sees.
    """
    pairs = tokens * (tokens + 1) // 2
    attention = 4 * spec.layers * spec.query_heads * spec.head_dim * pairs
    head = 2 * spec.hidden_size * spec.vocabulary_size
    return Work(2 * matrix_weights(spec) * tokens + attention + head, 0)


def decode_step(spec: ModelSpec, dtype: str, batch: int, context: int) -> Work:
    """One token of each of `batch` sequences with `context` tokens of KV each."""
    weights = matrix_weights(spec) + spec.hidden_size * spec.vocabulary_size
    kv = 2 * spec.layers * spec.kv_heads * spec.head_dim * context * batch
    attention = 4 * spec.layers * spec.query_heads * spec.head_dim * context * batch
    return Work(2 * weights * batch + attention, (weights + kv) * _ITEM_BYTES[dtype])
