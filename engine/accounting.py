"""What each step had to do, what it took, and which bound it sat at. Pure.

Operations and bytes are counted from the model's shape: the least that any implementation must do
with what it was given. A multiplication and an addition are two operations. Of experts, a step
reads as many as its tokens could choose between them without sharing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from baton.model.spec import ModelSpec

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
OVERHEAD_FACTOR = 2.0
"""A step that took this many times what its bounds explain is bound by neither of them."""


@dataclass(frozen=True, slots=True)
class Work:
    """Operations, and bytes of weights and KV that are read."""

    flops: int
    bytes_read: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device can do, as measured when the engine warmed up."""

    flops_per_s: float
    bytes_per_s: float


class Bound(StrEnum):
    """What a step's time is explained by."""

    ARITHMETIC = "arithmetic"
    BANDWIDTH = "bandwidth"
    OVERHEAD = "overhead"


def matrix_weights(spec: ModelSpec, tokens: int, *, read: bool) -> int:
    """Weights of all layers' matrices that a step of so many tokens reads, or that each token uses.

    They differ where layers have experts. Embedding, head, norms and biases are not counted.
    """
    heads = (spec.query_heads + 2 * spec.kv_heads) * spec.head_dim
    attention = spec.hidden_size * (heads + spec.query_heads * spec.head_dim)
    total = 0
    for layer in range(spec.layers):
        total += attention
        experts = spec.experts_of(layer)
        if experts is None:
            total += 3 * spec.hidden_size * spec.intermediate_size
            continue
        each = 3 * spec.hidden_size * experts.intermediate_size
        used = min(experts.count, tokens * experts.per_token) if read else experts.per_token
        total += used * each + spec.hidden_size * experts.count
    return total


def prefill_work(spec: ModelSpec, dtype: str, start: int, tokens: int) -> Work:
    """A chunk of one prompt's tokens from `start` on, and the logits of its last token."""
    positions = range(start, start + tokens)
    pairs = {
        window: sum(min(p + 1, window or p + 1) for p in positions) for window in _windows(spec)
    }
    stop = start + tokens
    seen = {window: min(stop, tokens + window - 1 if window else stop) for window in _windows(spec)}
    return _work(spec, dtype, tokens, 1, pairs, seen)


def decode_work(spec: ModelSpec, dtype: str, contexts: Sequence[int]) -> Work:
    """One token of each sequence; `contexts` holds the tokens that each sees, itself included."""
    seen = {
        window: sum(min(context, window or context) for context in contexts)
        for window in _windows(spec)
    }
    return _work(spec, dtype, len(contexts), len(contexts), seen, seen)


def _windows(spec: ModelSpec) -> set[int | None]:
    return {spec.window_of(layer) for layer in range(spec.layers)}


def _work(
    spec: ModelSpec,
    dtype: str,
    tokens: int,
    logits: int,
    pairs: dict[int | None, int],
    seen: dict[int | None, int],
) -> Work:
    """`pairs` of tokens that attention joins, and tokens whose KV is `seen`, by a layer's window.

    Attention's scores cost two operations for each pair and element of a head, and their sum over
    values as many again.
    """
    head = spec.hidden_size * spec.vocabulary_size
    flops = 2 * matrix_weights(spec, tokens, read=False) * tokens + 2 * head * logits
    items = matrix_weights(spec, tokens, read=True) + head
    for layer in range(spec.layers):
        window = spec.window_of(layer)
        flops += 4 * spec.query_heads * spec.head_dim * pairs[window]
        items += 2 * spec.kv_heads * spec.head_dim * seen[window]
    return Work(flops, items * ITEM_BYTES[dtype])


def bound_of(work: Work, seconds: float, limits: Limits) -> Bound:
    """What explains a step that took so long."""
    arithmetic_s = work.flops / limits.flops_per_s
    bandwidth_s = work.bytes_read / limits.bytes_per_s
    if seconds > OVERHEAD_FACTOR * max(arithmetic_s, bandwidth_s):
        return Bound.OVERHEAD
    return Bound.ARITHMETIC if arithmetic_s > bandwidth_s else Bound.BANDWIDTH


class Meter:
    """Adds steps up as counters; rates are quotients of them.

    For `kind` prefill and decode: `kind_steps`, `kind_flops`, `kind_bytes_read`, `kind_busy_us`,
    and `kind_bound_by_…` for each `Bound`. Achieved operations per second are flops / busy.
    """

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.reset()
        self.limits: Limits | None = None
        """None until they are measured; no step is given a bound before that."""

    def reset(self) -> None:
        """Set every counter to zero. All are there from the start: who reads may be elsewhere."""
        names = ("steps", "flops", "bytes_read", "busy_us", *(f"bound_by_{b}" for b in Bound))
        for kind in ("prefill", "decode"):
            for name in names:
                self.counters[f"{kind}_{name}"] = 0

    def add(self, kind: str, work: Work, seconds: float) -> None:
        """Count one step."""
        self.counters[f"{kind}_steps"] += 1
        self.counters[f"{kind}_flops"] += work.flops
        self.counters[f"{kind}_bytes_read"] += work.bytes_read
        self.counters[f"{kind}_busy_us"] += round(seconds * 1e6)
        if self.limits is not None:
            self.counters[f"{kind}_bound_by_{bound_of(work, seconds, self.limits)}"] += 1
