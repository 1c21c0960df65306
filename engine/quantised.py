"""Matrices of 8-bit and 4-bit integers: how they are made, and how they multiply on a CPU.

int8 is symmetric with one scale for each output. int4 has a scale and a zero for each group of 32
inputs: w = (q - 8) * scale + zero, q from 0 to 15, which is what torch's kernel computes and what a
Q4_0 or Q4_1 block of a GGUF file states.

A product of few rows reads memory and goes to torch's packed kernels; one of many rows is
arithmetic, and there it pays to dequantise first. Measured for 1536 outputs of 576 inputs on one
Zen 5 core, microseconds; bfloat16 is oneDNN's product, the last two make the weight bfloat16 first:

| rows | bfloat16 | int8 kernel | int4 kernel | int8 by bfloat16 | int4 by bfloat16 |
|------|----------|-------------|-------------|------------------|------------------|
| 1    | 86       | 77          | 56          | 326              | 2639             |
| 8    | 125      | 218         | 176         | 286              | 2282             |
| 32   | 342      | 801         | 692         | 550              | 2487             |
| 512  | 4628     | 12461       | 10793       | 5125             | 6988             |
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F

from baton.errors import ConfigError

GROUP: Final = 32
"""Inputs that share a scale and a zero in int4, as in a block of GGUF."""
KERNEL_ROWS: Final = {"int8": 16, "int4": 192}
"""Most rows that go to the packed kernel. int4 costs more to dequantise: it must be unpacked."""
_PACKED_ROWS: Final = 64
_INNER_TILES: Final = 1  # the CPU's packing takes the argument and ignores it


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [..., inputs] of floats as int8 of the same shape and float32 scales [...].

    No element moves by more than half a scale, which is the row's largest magnitude over 127.
    """
    wide = weight.float()
    scales = wide.abs().amax(-1) / 127
    safe = torch.where(scales > 0, scales, 1.0)
    return (wide / safe[..., None]).round().clamp(-127, 127).to(torch.int8), scales


def quantise_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[outputs, inputs] of floats as integers 0..15, and scales and zeros [outputs, groups].

    Integers are uint8 of the weight's shape, the others float32. No element moves by more than half
    a scale, which is the range of its group over 15.
    """
    outputs, inputs = weight.shape
    groups = weight.float().view(outputs, inputs // GROUP, GROUP)
    least, most = groups.aminmax(dim=2)
    scales = (most - least) / 15
    safe = torch.where(scales > 0, scales, 1.0)
    integers = ((groups - least[..., None]) / safe[..., None]).round().clamp(0, 15)
    return integers.to(torch.uint8).view(outputs, inputs), scales, least + 8 * scales


def check_shape(name: str, outputs: int, inputs: int) -> None:
    """Raise `ConfigError` where torch's int4 kernel cannot hold a matrix of this shape."""
    if outputs % 16 or inputs % GROUP:
        raise ConfigError(
            f"--quantize int4 needs outputs in 16s and inputs in {GROUP}s, but {name} is "
            f"{outputs} by {inputs}; use --quantize int8"
        )


class Int8Linear:
    """x ↦ x Wᵀ + b with W in int8, for [rows, inputs] to [rows, outputs] of x's dtype."""

    __slots__ = ("_bias", "_integers", "_scales")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Quantises W, [outputs, inputs] of floats; computes in its dtype."""
        self._integers, scales = quantise_int8(weight)
        self._scales = scales.to(weight.dtype)  # [outputs]
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= KERNEL_ROWS["int8"]:
            product = torch._weight_int8pack_mm(x.contiguous(), self._integers, self._scales)
        else:
            product = F.linear(x, self._integers.to(x.dtype)) * self._scales
        return product if self._bias is None else product + self._bias


class Int4Linear:
    """x ↦ x Wᵀ + b with W in int4 groups, for [rows, inputs] to [rows, outputs] of x's dtype."""

    __slots__ = ("_bias", "_packed", "_scales_zeros", "_unpacks")

    def __init__(
        self,
        integers: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        dtype: torch.dtype,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Takes what `quantise_int4` returns, or a GGUF file's own integers; computes in `dtype`.

        Raises `ConfigError` where the kernel cannot hold the shape.
        """
        check_shape("a matrix", *integers.shape)
        wide = integers.to(torch.int32)
        self._packed = torch._convert_weight_to_int4pack_for_cpu(wide, _INNER_TILES)
        pairs = torch.stack((scales.t(), zeros.t()), dim=2)  # [groups, outputs, 2]
        self._scales_zeros = pairs.to(dtype).contiguous()
        self._bias = bias
        # The packing is torch's own affair and differs between CPUs, so it is looked at, not known.
        self._unpacks = len(integers) % _PACKED_ROWS == 0 and torch.equal(self._unpack(), integers)

    @classmethod
    def quantise(cls, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int4Linear:
        """Quantise W, [outputs, inputs] of floats. Raises `ConfigError`."""
        check_shape("a matrix", *weight.shape)
        return cls(*quantise_int4(weight), weight.dtype, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= KERNEL_ROWS["int4"] or not self._unpacks:
            product = torch._weight_int4pack_mm_for_cpu(
                x.contiguous(), self._packed, GROUP, self._scales_zeros
            )
        else:
            product = x @ self._dequantise(x.dtype)
        return product if self._bias is None else product + self._bias

    def _unpack(self) -> torch.Tensor:
        """The integers, uint8 [outputs, inputs].

        With AVX-512 a byte holds rows i and i + 32 of 64 (`weight_to_int4pack_kernel` in torch's
        int4mm_kernel.cpp).
        """
        outputs, half = self._packed.shape
        bytes_ = self._packed.view(outputs // _PACKED_ROWS, 2 * half, _PACKED_ROWS // 2)
        rows = torch.cat((bytes_ & 15, bytes_ >> 4), dim=2)  # [outputs / 64, inputs, 64]
        return rows.transpose(1, 2).reshape(outputs, 2 * half)

    def _dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """Wᵀ as floats [inputs, outputs], without turning the packed blocks of rows around."""
        outputs, half = self._packed.shape
        blocks, middle = outputs // _PACKED_ROWS, _PACKED_ROWS // 2
        packed = self._packed.view(blocks, 2 * half, middle).transpose(0, 1)
        weight = torch.empty(2 * half, blocks, _PACKED_ROWS, dtype=dtype)
        weight[..., :middle] = packed & 15
        weight[..., middle:] = packed >> 4
        groups = weight.view(-1, GROUP, outputs).sub_(8)
        scales, zeros = self._scales_zeros[:, None].unbind(3)  # each [groups, 1, outputs]
        return torch.addcmul(zeros, groups, scales).view(2 * half, outputs)
