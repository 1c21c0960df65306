"""A matrix made ready for the machine that multiplies by it, once, when a model is loaded.

On a CPU with oneDNN the weight is laid out in oneDNN's own blocks. Measured on one Zen 5 core,
beside `F.linear` on the plain weight: bfloat16 1.5 to 2.2 times as fast for 1 to 32 rows and 1.1
times for 512; float32 1.2 to 2.4 times and 1.1 to 1.4 times. The layout is chosen without a hint of
the number of rows: a hint of one row made float32 batches up to half as slow again.

bfloat16 on one thread of a CPU with AVX512-BF16 goes to `engine.native` instead. oneDNN's packed
product took 1.2 to 2.2 times as long for 1 to 2 rows, 0.9 to 1.9 times for 4 to 8, 1.05 to 1.4
times for 16 to 64 and 1.03 to 1.07 times for 512 (shapes of SmolLM2-135M, in turn, medians).
The number of torch threads when the matrix is laid out decides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.native import NativeLinear, serves


def packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN can lay this matrix out and multiply by it here."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class Linear:
    """x ↦ x Wᵀ + b for [rows, inputs] to [rows, outputs], of the weight's dtype."""

    __slots__ = ("_bias", "_native", "_packed", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Takes W as [outputs, inputs] and b as [outputs]; keeps no reference to a W it packs."""
        self._native = NativeLinear(weight, bias) if serves(weight) else None
        if self._native is not None:
            return
        self._bias = bias
        self._packed = packs(weight)
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._native is not None:
            return self._native(x)
        if self._packed:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, "none", [], ""
            )
            return product
        return F.linear(x, self._weight, self._bias)
