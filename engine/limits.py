"""How fast this device multiplies matrices and reads memory, measured in a moment at start."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from engine.accounting import Limits

_READ_BYTES = 128 << 20
_MATRIX_SIZE = 1024
_TRIES = 3


def measure_limits(dtype: torch.dtype, device: torch.device) -> Limits:
    """The best of a few tries of a plain matrix product of this dtype, and of reading memory."""
    memory = torch.ones(_READ_BYTES // 8, dtype=torch.int64, device=device)
    matrix = torch.ones(_MATRIX_SIZE, _MATRIX_SIZE, dtype=dtype, device=device)
    product_s = _best(lambda: torch.mm(matrix, matrix), device)
    read_s = _best(memory.sum, device)
    return Limits(2 * _MATRIX_SIZE**3 / product_s, _READ_BYTES / read_s)


def _best(act: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        begun = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    once()  # what is made lazily is made now
    return min(once() for _ in range(_TRIES))
