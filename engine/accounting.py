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

from baton.kv_layout import ELEMENT_BYTES, row_bytes
from baton.model.spec import ModelSpec
from engine.segments import Segment

MATRIX_BYTES = {"int8": 1.0, "int4": 0.5}
"""Bytes of one weight of a layer's matrix, without its scales."""
_INT4_GROUP = 32
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


def weight_bytes(dtype: str, quantize: str) -> tuple[float, float]:
    """Bytes that one weight takes in a layer's matrix, and in the head.

    The head is int8 wherever weights are quantised. An int4 group has a scale and a zero; the one
    scale of an int8 row is not counted.
    """
    item = float(ELEMENT_BYTES[dtype])
    if quantize == "none":
        return item, item
    pairs = 2 * item / _INT4_GROUP if quantize == "int4" else 0.0
    return MATRIX_BYTES[quantize] + pairs, MATRIX_BYTES["int8"]


def step_work(
    spec: ModelSpec,
    dtype: str,
    segments: Sequence[Segment],
    kv_dtype: str = "",
    quantize: str = "none",
) -> Work:
    """Everything that a step of these segments has to do.

    `kv_dtype` is what the cache stores, that of the weights where it is empty.
    """
    row = row_bytes(kv_dtype or dtype, spec.head_dim)
    kv_bytes = 0
    tokens = sum(len(segment.token_ids) for segment in segments)
    choices = sum(segment.choices for segment in segments)
    head = spec.hidden_size * spec.vocabulary_size
    flops = 2 * matrix_weights(spec, tokens, read=False) * tokens + 2 * head * choices
    matrix_bytes, head_bytes = weight_bytes(dtype, quantize)
    weights = matrix_weights(spec, tokens, read=True) * matrix_bytes
    weights += head * head_bytes if choices else 0
    for window, layers in Counter(spec.window_of(layer) for layer in range(spec.layers)).items():
        pairs = sum(_pairs(segment, window) for segment in segments)
        seen = sum(_seen(segment, window) for segment in segments)
        flops += layers * 4 * spec.query_heads * spec.head_dim * pairs
        kv_bytes += layers * 2 * spec.kv_heads * row * seen
    return Work(flops, round(weights) + kv_bytes)


def _pairs(segment: Segment, window: int | None) -> int:
    """Pairs of tokens that attention joins.

    Its scores cost two operations for each pair and element of a head, and their sum over values as
    many again.
    """
    if window is None:
        return (segment.start + 1 + segment.stop) * len(segment.token_ids) // 2
    return sum(min(place + 1, window) for place in range(segment.start, segment.stop))


def _seen(segment: Segment, window: int | None) -> int:
    """Tokens whose KV is read."""
    if window is None:
        return segment.stop
    return min(segment.stop, len(segment.token_ids) + window - 1)


def bound_of(work: Work, seconds: float, limits: Limits) -> Bound:
    """What explains a step that took so long."""
    arithmetic_s = work.flops / limits.flops_per_s
    bandwidth_s = work.bytes_read / limits.bytes_per_s
    if seconds > OVERHEAD_FACTOR * max(arithmetic_s, bandwidth_s):
        return Bound.OVERHEAD
    return Bound.ARITHMETIC if arithmetic_s > bandwidth_s else Bound.BANDWIDTH


class Kind(StrEnum):
    """What a step is for."""

    PREFILL = "prefill"
    DECODE = "decode"


class Meter:
    """Adds steps up as counters; rates are quotients of them.

    For each `Kind`: `kind_steps`, `kind_flops`, `kind_bytes_read`,
    `kind_busy_us`, and `kind_bound_by_…` for each `Bound`. Achieved operations per second are
    flops / busy.
    """

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.reset()
        self.limits: Limits | None = None
        """None until they are measured; no step is given a bound before that."""

    def reset(self) -> None:
        """Set every counter to zero. All are there from the start: who reads may be elsewhere."""
        names = ("steps", "flops", "bytes_read", "busy_us", *(f"bound_by_{b}" for b in Bound))
        for kind in Kind:
            for name in names:
                self.counters[f"{kind}_{name}"] = 0

    def add(self, kind: Kind, work: Work, seconds: float) -> None:
        """Count one step."""
        self.counters[f"{kind}_steps"] += 1
        self.counters[f"{kind}_flops"] += work.flops
        self.counters[f"{kind}_bytes_read"] += work.bytes_read
        self.counters[f"{kind}_busy_us"] += round(seconds * 1e6)
        if self.limits is not None:
            self.counters[f"{kind}_bound_by_{bound_of(work, seconds, self.limits)}"] += 1
