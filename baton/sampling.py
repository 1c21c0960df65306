"""Sampling and stop parameters with their defaults and limits, and the random number of a position.

The random number depends on nothing but (seed, position), so a sampled answer continues
identically on another node, in another batch, and after a retry (promise P3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from baton.errors import InvalidRequest

_MASK32 = 0xFFFFFFFF
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_PHILOX_ROUNDS = 10
MAX_SEED = (1 << 64) - 1


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # the model ended it
    LENGTH = "length"  # max_tokens was reached


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How each token of an answer is chosen. The defaults choose greedily."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class StopParams:
    """When an answer ends: after `max_tokens` tokens, or earlier at an end-of-sequence token."""

    max_tokens: int
    ignore_eos: bool = False


def validate_sampling(params: SamplingParams) -> SamplingParams:
    """Return `params`, or raise `InvalidRequest` naming the first value out of range."""

    def require(valid: bool, name: str, value: float, wanted: str) -> None:
        if not valid:
            raise InvalidRequest(f"{name} is {value}; send {wanted}")

    temperature = params.temperature
    require(
        math.isfinite(temperature) and 0.0 <= temperature <= 100.0,
        "temperature",
        temperature,
        "a number from 0 (greedy) to 100",
    )
    require(0 <= params.top_k <= 1 << 30, "top_k", params.top_k, "0 (keep all) or more")
    require(0.0 < params.top_p <= 1.0, "top_p", params.top_p, "more than 0 and at most 1")
    require(0.0 <= params.min_p <= 1.0, "min_p", params.min_p, "a number from 0 to 1")
    require(0 <= params.seed <= MAX_SEED, "seed", params.seed, "a whole number of at most 64 bits")
    return params


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        product0, product1 = c0 * _PHILOX_M0, c2 * _PHILOX_M1
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK32,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + _PHILOX_W0) & _MASK32, (k1 + _PHILOX_W1) & _MASK32
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) that chooses the token at `position` of the whole sequence.

    53 bits of one Philox block whose key is the seed and whose counter is the position.
    """
    words = philox4x32(
        (position & _MASK32, (position >> 32) & _MASK32, 0, 0),
        (seed & _MASK32, (seed >> 32) & _MASK32),
    )
    high, low = words[0] >> 5, words[1] >> 6  # 27 and 26 bits
    return (high * (1 << 26) + low) / (1 << 53)
