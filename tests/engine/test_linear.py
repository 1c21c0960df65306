"""A packed matrix multiplies as the plain one does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.linear import Linear, packs

SHAPES = [(1, 1), (3, 5), (96, 64), (576, 1536)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_the_product_is_that_of_the_plain_weight(
    dtype: torch.dtype, with_bias: bool, outputs: int, inputs: int, rows: int
) -> None:
    numbers = torch.Generator().manual_seed(outputs * rows)
    weight = torch.randn(outputs, inputs, generator=numbers).to(dtype)
    bias = torch.randn(outputs, generator=numbers).to(dtype) if with_bias else None
    x = torch.randn(rows, inputs, generator=numbers).to(dtype)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    got = Linear(weight, bias)(x)
    assert got.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * inputs**0.5)


def test_without_onednn_the_plain_weight_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(7, 5), torch.randn(2, 5)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not packs(weight)
    torch.testing.assert_close(Linear(weight)(x), F.linear(x, weight))


def test_what_onednn_cannot_multiply_is_left_as_it_is() -> None:
    assert not packs(torch.zeros(2, 2, dtype=torch.float64))
    assert not packs(torch.zeros(2, 2, device="meta"))
