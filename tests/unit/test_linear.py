"""Products by oneDNN against float64, of sizes that do and do not fill its blocks; gradients as ever."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_compress.models import linear as linear_module
from moe_compress.models.linear import BLOCK, HAS_ONEDNN, LEAST_WORK, ROWS, linear, speed_up


@pytest.mark.parametrize("rows", [1, 2, 5, ROWS - 1, ROWS, ROWS + 1, BLOCK, 2 * BLOCK + 3])
@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_equals_a_product_in_float64(rows: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "LEAST_WORK", 0)
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(rows, 48, generator=generator), torch.randn(40, 48, generator=generator)
    bias = torch.randn(40, generator=generator) if biased else None
    expected = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(linear(inputs, weight, bias).double(), expected, rtol=1e-5, atol=1e-4)
    strided = torch.randn(48, rows, generator=generator).T  # and not contiguous
    torch.testing.assert_close(
        linear(strided, weight).double(), strided.double() @ weight.double().T, rtol=1e-5, atol=1e-4
    )


@torch.no_grad()
def test_large_products_go_another_way_than_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[int] = []
    block = linear_module._block
    monkeypatch.setattr(linear_module, "_block", lambda *arguments: (ways.append(1), block(*arguments))[1])
    weight = torch.randn(256, 256)
    few, many = LEAST_WORK // 256**2 - 1, LEAST_WORK // 256**2
    assert linear(torch.randn(few, 256), weight).shape == (few, 256) and not ways
    assert linear(torch.randn(2, many // 2, 256), weight).shape == (2, many // 2, 256)
    assert len(ways) == int(HAS_ONEDNN)
    linear(torch.randn(many, 256).double(), weight.double())
    linear(torch.randn(many, 256).bfloat16(), weight.bfloat16())
    assert len(ways) == int(HAS_ONEDNN)


def test_gradients_flow_and_modules_keep_their_weights() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256), nn.Linear(256, 256, bias=False))
    inputs = torch.randn(300, 256)
    expected = model(inputs)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    names = list(model.state_dict())
    speed_up(model)
    model.zero_grad()
    model(inputs).square().sum().backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert parameter.grad is not None and torch.equal(gradient, parameter.grad)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == names
