"""Matrices in 8 or 4 bits: laid out once, multiplied by torch's own kernels.

int8 has one scale for each output. int4 has, for each output and 32 inputs, a scale and the value
of the middle step, which is the grid of GGUF's Q4_0 and Q4_1: a model that was quantised so, such
as the default one, comes back to the very steps it had, for the least and greatest of a group are
steps of it. Few rows are bound by reading weights, and there the narrow ones are read faster; many
rows are bound by arithmetic, where torch's kernels are slower than oneDNN's bfloat16 (measured on
one Zen 5 core, 8 rows and more, cache-warm: 2 to 2.5 times): these are for decode nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from baton.errors import ConfigError
from engine.linear import Linear

Quantisation = Literal["none", "int8", "int4"]
GROUP = 32
"""Inputs that share an int4 scale."""

_INT4_OUTPUTS = 16
"""torch lays int4 matrices out in so many outputs."""

_WIDEN_ROWS = 64
"""From so many rows on an int8 matrix is widened and multiplied as a plain one."""

_K_TILES = 1  # of torch's CUDA layout; the CPU one has no such thing


def int8_steps(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[outputs, inputs] as int8 steps and a float32 scale for each output: w ≈ step * scale."""
    wide = weight.float()
    scale = wide.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (wide / scale[:, None]).round().to(torch.int8), scale


def int4_steps(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[outputs, inputs] as steps 0 to 15 (int32), with scale and middle of each group.

    w ≈ (step - 8) * scale + middle; scale and middle are float32 [outputs, inputs / 32].
    """
    outputs, inputs = weight.shape
    groups = weight.float().view(outputs, inputs // GROUP, GROUP)
    least, greatest = groups.amin(-1), groups.amax(-1)
    scale = ((greatest - least) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    steps = ((groups - least[..., None]) / scale[..., None]).round().clamp(0, 15)
    return steps.to(torch.int32).view(outputs, inputs), scale, least + 8 * scale


class Int8Linear:
    """x ↦ x Wᵀ + b with W in int8; same call as `engine.linear.Linear`."""

    __slots__ = ("_bias", "_scale", "_steps")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._steps, scale = int8_steps(weight)
        self._scale = scale.to(weight.dtype)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) >= _WIDEN_ROWS:
            return F.linear(x, self._steps.to(x.dtype) * self._scale[:, None], self._bias)
        product: torch.Tensor = torch._weight_int8pack_mm(x, self._steps, self._scale)
        return product if self._bias is None else product + self._bias


class Int4Linear:
    """x ↦ x Wᵀ + b with W in int4; same call as `engine.linear.Linear`."""

    __slots__ = ("_bias", "_packed", "_scales")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Raises `ConfigError` where the matrix does not divide into groups."""
        outputs, inputs = weight.shape
        if inputs % GROUP or outputs % _INT4_OUTPUTS:
            raise ConfigError(
                f"a matrix of {outputs} x {inputs} does not divide into int4 groups of {GROUP} "
                f"inputs and {_INT4_OUTPUTS} outputs; use --quantize int8"
            )
        steps, scale, middle = int4_steps(weight)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps, _K_TILES)
        # [groups, outputs, 2]
        self._scales = torch.stack((scale.T, middle.T), dim=-1).to(weight.dtype).contiguous()
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self._packed, GROUP, self._scales
        )
        return product if self._bias is None else product + self._bias


Make = Callable[[torch.Tensor, torch.Tensor | None], "Linear | Int8Linear | Int4Linear"]


def linear_maker(quantisation: Quantisation) -> Make:
    """What makes a layer's matrix ready."""
    makers: dict[Quantisation, Make] = {"none": Linear, "int8": Int8Linear, "int4": Int4Linear}
    return makers[quantisation]


def head_maker(quantisation: Quantisation) -> Make:
    """What makes the output head ready: no fewer than 8 bits, as in GGUF files of 4 bits."""
    return linear_maker("none" if quantisation == "none" else "int8")
