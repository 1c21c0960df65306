"""Which kind of linear map each matrix of a model becomes: plain, int8 or int4.

The head is int8 under either: torch has no finer kernel for it that keeps its Q8_0 precision. The
embedding, of which a step reads a row for each token, keeps the dtype, as norms and biases do.
Matrices are quantised after a tensor-parallel rank has taken its slice, so its
groups are whole.
"""

from __future__ import annotations

from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from baton.errors import ConfigError
from baton.model.folder import INT4_FILE
from baton.model.spec import ModelSpec
from engine.linear import Linear
from engine.quantised import GROUP, Int4Linear, Int8Linear, check_shape
from engine.shard import WHOLE, Shard


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
        spec: ModelSpec | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        """`folder` is where an import may have left the file's own 4-bit integers."""
        self.quantize = quantize
        self._file = None if folder is None else folder / INT4_FILE
        self._spec, self._shard = spec, shard

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
    def _names(self) -> frozenset[str]:
        if self._file is None or not self._file.exists():
            return frozenset()
        with safe_open(self._file, "pt") as stored:
            return frozenset(stored.keys())

    def _kept(
        self, layer: int, matrix: Matrix
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The file's integers [outputs, inputs], scales and zeros [outputs, groups], or None."""
        names = [f"model.layers.{layer}.{part}.weight" for part in matrix.value]
        if self._file is None or not all(f"{name}.integers" in self._names for name in names):
            return None
        parts = []
        with safe_open(self._file, "pt") as stored:
            for name in names:
                packed = stored.get_tensor(f"{name}.integers")  # [rows, columns / 2]
                integers = torch.stack((packed & 15, packed >> 4), 2).view(len(packed), -1)
                pairs = stored.get_tensor(f"{name}.scales_zeros")  # [rows, columns / 32, 2]
                rows, columns = self._slices(name, *integers.shape)
                if columns.start % GROUP or columns.stop % GROUP:
                    return None  # a rank's slice cuts a block in two
                groups = slice(columns.start // GROUP, columns.stop // GROUP)
                parts.append((integers[rows, columns], pairs[rows, groups]))
        integers = torch.cat([part[0] for part in parts])
        scales, zeros = torch.cat([part[1] for part in parts]).unbind(2)
        return integers, scales, zeros

    def _slices(self, name: str, rows: int, columns: int) -> tuple[slice, slice]:
        """This rank's rows and columns of a stored matrix, as `engine.weights` takes them."""
        assert self._spec is not None, "a folder comes with its spec"
        size, shard = self._spec.head_dim, self._shard
        if "o_proj" in name:
            heads = shard.part(self._spec.query_heads)
            return slice(0, rows), slice(heads.start * size, heads.stop * size)
        if "down_proj" in name:
            part = shard.part(columns)
            return slice(0, rows), slice(part.start, part.stop)
        if "k_proj" in name or "v_proj" in name:
            heads = shard.kv_part(self._spec.kv_heads)
            return slice(heads.start * size, heads.stop * size), slice(0, columns)
        part = shard.part(rows)
        return slice(part.start, part.stop), slice(0, columns)


PLAIN = Linears()
