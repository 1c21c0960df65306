"""The native product is that of float64 within bfloat16's rounding, and each row stands alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.native import NativeLinear, serves
from engine.native.build import library

pytestmark = pytest.mark.skipif(
    library() is None, reason="needs a C compiler and a CPU with AVX512-BF16"
)
TOLERANCE = 3e-3  # of the whole result's norm: rounding to bfloat16 alone gives 1.7e-3


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 40), st.integers(1, 200), st.integers(1, 150), st.booleans())
def test_any_shape_agrees_with_float64(
    rows: int, inputs: int, outputs: int, with_bias: bool
) -> None:
    numbers = torch.Generator().manual_seed(rows * 1000 + inputs + outputs)
    weight = torch.randn(outputs, inputs, generator=numbers).bfloat16()
    bias = torch.randn(outputs, generator=numbers).bfloat16() if with_bias else None
    x = torch.randn(rows, inputs, generator=numbers).bfloat16()
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    got = NativeLinear(weight, bias)(x)
    assert got.shape == wanted.shape
    assert (got.double() - wanted).norm() <= TOLERANCE * wanted.norm()


@pytest.mark.parametrize("rows", [2, 11, 12, 13, 25, 500])
def test_a_row_is_bitwise_the_same_alone_and_in_a_batch(rows: int) -> None:
    product = NativeLinear(torch.randn(70, 1536).bfloat16(), None)
    x = torch.randn(rows, 1536).bfloat16()
    together = product(x)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(product(x[row : row + 1])[0], together[row])


def test_only_bfloat16_on_one_thread_is_served(one_thread: None) -> None:
    assert serves(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not serves(torch.zeros(2, 2))
    torch.set_num_threads(2)
    assert not serves(torch.zeros(2, 2, dtype=torch.bfloat16))
