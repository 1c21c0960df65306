"""Which kind of linear map each matrix of a model becomes: plain, int8 or int4.

The head is int8 under either: in int4 it raised the default model's perplexity by 5%. The
embedding, of which a step reads a row for each token, keeps the dtype, as norms and biases do.
Matrices are quantised after a tensor-parallel rank has taken its slice, so its groups are whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors import safe_open

from baton.errors import ConfigError
from baton.model.folder import INT4_FILE
from baton.model.spec import ModelSpec
from engine.linear import Linear
from engine.quantised import GROUP, Int4Linear, Int8Linear, check_shape
from engine.weights import Kept


class LinearMap(Protocol):
    """x [rows, inputs] ↦ [rows, outputs]."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...


class Matrix(Enum):
    """A layer's matrices, and the stored ones that stand below each other in each."""

    QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    OUTPUT = ("self_attn.o_proj",)
    GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
    DOWN = ("mlp.down_proj",)


def check_quantise(quantize: str, spec: ModelSpec, device: str) -> None:
    """Raise `ConfigError` with what to do where this model cannot be quantised so here."""
    if quantize == "none":
        return
    if device != "cpu":
        raise ConfigError(
            f"--quantize {quantize} computes on the CPU alone; use --device cpu, or leave it out"
        )
    if spec.experts is not None:
        raise ConfigError(
            f"--quantize {quantize} has no kernel for experts, which {spec.name} has; "
            "leave it out, and use --dtype bfloat16 to halve the memory"
        )
    if quantize == "int4":
        heads = (spec.query_heads + 2 * spec.kv_heads) * spec.head_dim
        check_shape("a layer's q, k and v", heads, spec.hidden_size)
        check_shape("a layer's output", spec.hidden_size, spec.query_heads * spec.head_dim)
        check_shape("a layer's gate and up", 2 * spec.intermediate_size, spec.hidden_size)
        check_shape("a layer's down", spec.hidden_size, spec.intermediate_size)


class Linears:
    """Makes the linear maps of one model, of a whole one or of a rank's slice."""

    def __init__(
        self,
        quantize: str = "none",
        folder: Path | None = None,
        kept: Mapping[str, Kept] = MappingProxyType({}),
    ) -> None:
        """`folder` is where an import may have left the file's own 4-bit integers.

        `kept` says which rows and columns of each stored tensor this rank has, as loaded.
        """
        self.quantize = quantize
        self._file = None if folder is None else folder / INT4_FILE
        self._kept_parts = kept

    def make(
        self, layer: int, matrix: Matrix, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> LinearMap:
        """The map of one matrix of a layer: `weight` is [outputs, inputs], this rank's."""
        if self.quantize == "none":
            return Linear(weight, bias)
        if self.quantize == "int8":
            return Int8Linear(weight, bias)
        kept = self._kept(layer, matrix)
        if kept is None:
            return Int4Linear.quantise(weight, bias)
        integers, scales, zeros = kept
        assert integers.shape == weight.shape, f"{integers.shape} for {weight.shape}"
        return Int4Linear(integers, scales, zeros, weight.dtype, bias)

    def head(self, weight: torch.Tensor) -> LinearMap:
        """The map from hidden states to logits."""
        return Linear(weight) if self.quantize == "none" else Int8Linear(weight)

    @cached_property
    def _stored(self) -> Any:
        """The file of integers, open; None where there is none."""
        if self._file is None or not self._file.exists():
            return None
        return safe_open(self._file, "pt")

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self._stored.keys() if self._stored is not None else ())

    def _kept(
        self, layer: int, matrix: Matrix
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The file's integers [outputs, inputs], scales and zeros [outputs, groups], or None."""
        names = [f"model.layers.{layer}.{part}.weight" for part in matrix.value]
        if not all(f"{name}.integers" in self._names for name in names):
            return None
        parts = []
        for name in names:
            rows, columns = self._kept_parts[name]
            if columns.start % GROUP or columns.stop % GROUP:
                return None  # a rank's slice cuts a block in two
            packed = self._stored.get_tensor(f"{name}.integers")  # [rows, columns / 2]
            integers = torch.stack((packed & 15, packed >> 4), 2).view(len(packed), -1)
            pairs = self._stored.get_tensor(f"{name}.scales_zeros")  # [rows, columns / 32, 2]
            groups = slice(columns.start // GROUP, columns.stop // GROUP)
            here = slice(rows.start, rows.stop)
            parts.append((integers[here, columns.start : columns.stop], pairs[here, groups]))
        integers = torch.cat([part[0] for part in parts])
        scales, zeros = torch.cat([part[1] for part in parts]).unbind(2)
        return integers, scales, zeros


PLAIN = Linears()
