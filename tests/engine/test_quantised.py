"""Matrices in fewer bits: near what they were, and multiplied as what they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import ConfigError
from baton.model.spec import ModelSpec
from engine.kv_cache import PagedKvCache
from engine.model import Llama
from engine.quantised import (
    GROUP,
    Int4Linear,
    Int8Linear,
    Quantisation,
    int4_steps,
    int8_steps,
)
from engine.weights import LayerWeights, ModelWeights
from tests.engine.tiny import CPU, feed
from tests.router.samples import SPEC

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # ‖out - ref‖ / ‖ref‖
SEEDS = st.integers(0, 10_000)


def matrix(seed: int, outputs: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (outputs, inputs)
    return (torch.randn(shape, generator=generator) * (1 + seed % 7) / inputs**0.5).to(dtype)


def int4_weight(weight: torch.Tensor) -> torch.Tensor:
    """What the steps stand for, in float64."""
    steps, scale, middle = (part.double() for part in int4_steps(weight))
    groups = steps.view(*scale.shape, GROUP) - 8
    return (groups * scale[..., None] + middle[..., None]).view(weight.shape)


def int8_weight(weight: torch.Tensor) -> torch.Tensor:
    steps, scale = int8_steps(weight)
    return steps.double() * scale.double()[:, None]


@settings(deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(1, 4), st.sampled_from(list(TOLERANCE)))
def test_every_weight_is_within_half_a_step(
    seed: int, outputs: int, groups: int, dtype: torch.dtype
) -> None:
    weight = matrix(seed, outputs, groups * GROUP, dtype)
    _, scale, _ = int4_steps(weight)
    error = (int4_weight(weight) - weight.double()).abs().view(outputs, groups, GROUP)
    assert (error <= scale[..., None] * 0.5001).all()
    error = (int8_weight(weight) - weight.double()).abs()
    assert (error <= int8_steps(weight)[1][:, None] * 0.5001).all()


@settings(deadline=None, max_examples=60)
@given(
    SEEDS,
    st.integers(1, 6).map(lambda n: n * 16),
    st.integers(1, 4).map(lambda n: n * GROUP),
    st.sampled_from([1, 2, 7, 33, 64, 70]),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
)
def test_a_product_is_that_of_the_steps(
    seed: int, outputs: int, inputs: int, rows: int, dtype: torch.dtype, biased: bool
) -> None:
    """On either side of the number of rows from which int8 is widened first."""
    weight = matrix(seed, outputs, inputs, dtype)
    x = matrix(seed + 1, rows, inputs, dtype)
    bias = matrix(seed + 2, 1, outputs, dtype)[0] if biased else None
    for linear, meant in ((Int8Linear, int8_weight), (Int4Linear, int4_weight)):
        wanted = x.double() @ meant(weight).T + (0 if bias is None else bias.double())
        out = linear(weight, bias)(x)
        assert (out.dtype, out.shape) == (dtype, wanted.shape)
        assert (out.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


def test_a_matrix_of_zeros_stays_one() -> None:
    zeros = torch.zeros(16, GROUP)
    for linear in (Int8Linear, Int4Linear):
        assert torch.equal(linear(zeros)(torch.ones(3, GROUP)), torch.zeros(3, 16))


def test_blocks_of_a_gguf_file_come_back_to_their_own_steps() -> None:
    """Q4_1 holds steps 0 to 15 behind a scale and a minimum; its groups reach both ends."""
    weight = matrix(3, 64, 8 * GROUP, torch.float32)
    blocks = quantize(weight.numpy(), GGMLQuantizationType.Q4_1)
    widened = torch.from_numpy(dequantize(blocks, GGMLQuantizationType.Q4_1))
    # A block: scale and minimum in float16, then 16 bytes, low nibbles before high ones.
    nibbles = torch.from_numpy(blocks).view(64, 8, 20)[..., 4:]
    steps = torch.cat((nibbles & 15, nibbles >> 4), dim=-1).view(64, -1)
    assert torch.equal(int4_steps(widened)[0], steps.int())
    rounded, _, _ = int4_steps(widened.bfloat16())  # as a folder holds them
    assert (rounded == steps).double().mean() > 0.995


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 40), (24, 32)])
def test_what_does_not_divide_is_refused_with_what_to_do(outputs: int, inputs: int) -> None:
    with pytest.raises(ConfigError, match="use --quantize int8"):
        Int4Linear(torch.zeros(outputs, inputs))


@pytest.fixture
def spec() -> ModelSpec:
    return replace(
        SPEC,
        layers=2,
        query_heads=4,
        kv_heads=2,
        head_dim=16,
        hidden_size=64,
        intermediate_size=96,
        vocabulary_size=64,
    )


def random_model(spec: ModelSpec) -> ModelWeights:
    def layer(seed: int) -> LayerWeights:
        ones = torch.ones(64)
        return LayerWeights(
            input_norm=ones,
            qkv=matrix(seed, 128, 64, torch.float32),
            output=matrix(seed + 1, 64, 64, torch.float32),
            post_norm=ones,
            gate_up=matrix(seed + 2, 192, 64, torch.float32),
            down=matrix(seed + 3, 64, 96, torch.float32),
        )

    embedding = matrix(9, 64, 64, torch.float32) * 8
    return ModelWeights(embedding, [layer(10), layer(20)], torch.ones(64), embedding)


@pytest.mark.parametrize(("quantisation", "alike"), [("int8", 0.999), ("int4", 0.95)])
def test_a_quantised_model_says_nearly_the_same(
    spec: ModelSpec, quantisation: Quantisation, alike: float
) -> None:
    logits = []
    for kind in ("none", quantisation):
        cache = PagedKvCache(spec, 4, 4, torch.float32, CPU)
        model = Llama(spec, random_model(spec), cache, kind)  # type: ignore[arg-type]
        with torch.inference_mode():
            logits.append(feed(model, range(3, 15), 0, (2, 0, 1)))
    assert not torch.equal(*logits)
    assert torch.corrcoef(torch.stack(logits))[0, 1] > alike


def test_experts_are_refused_by_name(tmp_path: Path, spec: ModelSpec) -> None:
    from baton.model.layer_rules import Experts

    sparse = replace(spec, experts=Experts(4, 2, 32, True, (0, 1)))
    cache = PagedKvCache(sparse, 4, 4, torch.float32, CPU)
    with pytest.raises(ConfigError, match="leave --quantize out"):
        Llama(sparse, random_model(spec), cache, "int8")
