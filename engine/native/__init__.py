"""bfloat16 on CPUs with AVX512-BF16: kernels of our own where torch's are slow. See ADR 7."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.native.build import kernels_for, library

_TILE = 32


def serves(weight: torch.Tensor) -> bool:
    """Whether the kernels multiply by this matrix: bfloat16, on one CPU thread, and they built."""
    return weight.dtype is torch.bfloat16 and kernels_for(weight.device) is not None


class NativeLinear:
    """x ↦ x Wᵀ + b in bfloat16 over tiles of 32 outputs. A row's answer depends on no other row."""

    __slots__ = ("_bias", "_inputs", "_outputs", "_pairs", "_product", "_tiles")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Takes W as [outputs, inputs] and b as [outputs]; keeps no reference to W."""
        loaded = library()
        assert loaded is not None, "ask `serves` first"
        self._product = loaded.baton_linear_bf16
        self._outputs, self._inputs = weight.shape
        short = -self._outputs % _TILE
        padded = F.pad(weight, (0, self._inputs % 2, 0, short))
        self._pairs = padded.shape[1] // 2
        tiles = padded.view(-1, _TILE, self._pairs, 2)
        self._tiles = tiles.transpose(1, 2).contiguous()  # [tiles, pairs, 32, 2]
        self._bias = None if bias is None else F.pad(bias.float(), (0, short))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype is torch.bfloat16, f"x is {x.dtype}"
        assert x.shape[-1] == self._inputs, f"x is {tuple(x.shape)}, W takes {self._inputs}"
        y = x.new_empty((*x.shape[:-1], self._outputs))
        x = F.pad(x, (0, 1)) if self._inputs % 2 else x.contiguous()
        bias = None if self._bias is None else self._bias.data_ptr()
        rows = y.numel() // self._outputs
        self._product(
            x.data_ptr(), self._tiles.data_ptr(), bias, y.data_ptr(),
            rows, self._pairs, self._outputs,
        )  # fmt: skip
        return y
