"""Quantised matrices: how far a weight moves, and what a product of them is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ConfigError
from baton.model import load_spec
from baton.model.gguf_blocks import INT4_KINDS, packed_integers, scales_zeros
from engine.linears import Linears, Matrix, check_quantise
from engine.quantised import Int4Linear, Int8Linear, quantise_int4, quantise_int8
from engine.shard import Shard
from engine.weights import load_weights
from tests.engine.test_gguf_families import imported
from tests.fixtures.family_gguf import quantised
from tests.fixtures.family_weights import family_config

SIZES = st.floats(1e-3, 1e3)
SEEDS = st.integers(0, 1 << 31)


def matrix(seed: int, outputs: int, inputs: int, size: float = 1.0) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=numbers) * size


@given(seed=SEEDS, size=SIZES)
def test_int8_moves_no_weight_by_more_than_half_a_scale(seed: int, size: float) -> None:
    weight = matrix(seed, 4, 48, size)
    integers, scales = quantise_int8(weight)
    moved = (integers * scales[:, None] - weight).abs()
    assert (moved <= scales[:, None] * 0.501).all()


@given(seed=SEEDS, size=SIZES, offset=st.floats(-10, 10))
def test_int4_moves_no_weight_by_more_than_half_a_scale(
    seed: int, size: float, offset: float
) -> None:
    weight = matrix(seed, 4, 96, size) + offset * size
    integers, scales, zeros = (part.double() for part in quantise_int4(weight))
    back = (integers.view(4, 3, 32) - 8) * scales[..., None] + zeros[..., None]
    moved = (back.view(4, 96) - weight).abs()
    assert (moved <= (scales * 0.501 + size * 1e-4).repeat_interleave(32, 1)).all()


def test_a_row_of_zeros_stays_zero() -> None:
    x = torch.ones(1, 32)
    assert (Int8Linear(torch.zeros(16, 32))(x) == 0).all()
    assert (Int4Linear.quantise(torch.zeros(16, 32))(x) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (96, 64), (576, 192)])
@pytest.mark.parametrize("rows", [1, 8, 17, 600])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_product_is_that_of_the_rounded_weight(
    dtype: torch.dtype, with_bias: bool, outputs: int, inputs: int, rows: int, kind: str
) -> None:
    weight, x = matrix(rows, outputs, inputs).to(dtype), matrix(rows + 1, rows, inputs).to(dtype)
    bias = matrix(3, 1, outputs)[0].to(dtype) if with_bias else None
    if kind == "int8":
        integers, scales = quantise_int8(weight)
        rounded = integers.double() * scales[:, None].double()
        got = Int8Linear(weight, bias)(x)
    else:
        integers, scales, zeros = quantise_int4(weight)
        groups = integers.double().view(outputs, -1, 32) - 8
        rounded = (groups * scales[..., None] + zeros[..., None]).view(outputs, inputs)
        got = Int4Linear.quantise(weight, bias)(x)
    wanted = x.double() @ rounded.t() + (0 if bias is None else bias.double())
    assert got.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * inputs**0.5)


@pytest.mark.parametrize("kind", sorted(INT4_KINDS), ids=lambda kind: kind.name)
def test_gguf_integers_and_scales_are_those_of_the_blocks(kind: GGMLQuantizationType) -> None:
    blocks = quantize(matrix(1, 6, 128).numpy(), kind)
    packed = packed_integers(blocks, kind)
    integers = np.stack((packed & 15, packed >> 4), axis=2).reshape(6, 4, 32)
    pairs = scales_zeros(blocks, kind).reshape(6, 4, 2)
    stored = blocks.reshape(6, 4, -1)[..., -16:]
    np.testing.assert_array_equal(integers[..., :16], stored & 15)
    np.testing.assert_array_equal(integers[..., 16:], stored >> 4)
    back = (integers.astype(np.float32) - 8) * pairs[..., :1] + pairs[..., 1:]
    np.testing.assert_allclose(back.reshape(6, 128), dequantize(blocks, kind), atol=1e-5)


@pytest.mark.parametrize("shard", [Shard(0, 1), Shard(1, 2)], ids=str)
def test_an_imported_file_multiplies_by_its_own_integers(tmp_path: Path, shard: Shard) -> None:
    """Also where rows are put in another order, as the queries' and keys' of a Llama."""
    config = family_config("llama2") | {"head_dim": 32, "hidden_size": 64}
    folder = imported(tmp_path, config, quantised(GGMLQuantizationType.Q4_1))
    spec = load_spec(folder)
    weights = load_weights(folder, spec, torch.float32, torch.device("cpu"), shard)
    linears, layer = Linears("int4", folder, weights.kept), weights.layers[0]
    for name, weight in (
        (Matrix.QKV, layer.qkv),
        (Matrix.OUTPUT, layer.output),
        (Matrix.GATE_UP, layer.gate_up),
        (Matrix.DOWN, layer.down),
    ):
        kept = linears._kept(0, name)
        if kept is None:
            assert shard.size > 1
            continue
        integers, scales, zeros = kept
        groups = integers.float().view(len(integers), -1, 32) - 8
        back = (groups * scales[..., None] + zeros[..., None]).view(weight.shape)
        torch.testing.assert_close(back, weight, rtol=0, atol=1e-5)


def test_what_cannot_be_quantised_is_refused_with_what_to_do(tiny_folder: Path) -> None:
    spec = load_spec(tiny_folder)
    with pytest.raises(ConfigError, match="use --device cpu"):
        check_quantise("int8", spec, "cuda")
    with pytest.raises(ConfigError, match="use --quantize int8"):
        check_quantise("int4", replace(spec, hidden_size=40), "cpu")


def test_experts_are_refused_by_name(tmp_path: Path) -> None:
    spec = load_spec(imported(tmp_path, family_config("qwen3_moe")))
    with pytest.raises(ConfigError, match=r"experts, which .* has; leave it out"):
        check_quantise("int8", spec, "cpu")
    check_quantise("none", spec, "cpu")
