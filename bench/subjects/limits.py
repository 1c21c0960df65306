"""The machine itself: how fast memory is read and copied, how fast matrices are multiplied."""

from __future__ import annotations

import argparse
import time

import torch
from serving import serve

_BYTES = 512 << 20
_SIZE = 2048


class Limits:
    def __init__(self, dtype: str) -> None:
        self._source = torch.ones(_BYTES // 8, dtype=torch.int64)
        self._target = torch.zeros_like(self._source)
        self._left = torch.randn(_SIZE, _SIZE).to(getattr(torch, dtype))
        self._right = torch.randn(_SIZE, _SIZE).to(getattr(torch, dtype))

    def read(self) -> float:
        """Seconds for each GB that is read once and not written."""
        begun = time.perf_counter()
        self._source.sum()
        return (time.perf_counter() - begun) / (_BYTES / 1e9)

    def copy(self) -> float:
        """Seconds for each GB that is copied: read once and written once."""
        begun = time.perf_counter()
        self._target.copy_(self._source)
        return (time.perf_counter() - begun) / (_BYTES / 1e9)

    def matmul(self) -> float:
        """Seconds for each TFLOP of a plain matrix product."""
        begun = time.perf_counter()
        torch.mm(self._left, self._right)
        return (time.perf_counter() - begun) / (2 * _SIZE**3 / 1e12)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    serve("limits", torch.__version__, Limits(options.dtype))
