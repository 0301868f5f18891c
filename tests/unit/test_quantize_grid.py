"""Grids against compressed-tensors' own formulas, the scale search against every range it tries, error sentences."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams

from moe_compress.compress.quantize.rtn import rtn
from moe_compress.errors import CheckpointError, UsageError
from moe_compress.runtime import grid as grid_module
from moe_compress.runtime.grid import Grid, Quantized, check_finite, check_group_size, encode, fit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of different sizes and means, some of one sign, some all zero, with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.rand(*shape[:-1], 1, generator=generator)
    weight[..., ::3, :] += 0.5
    weight[..., 1::5, :] = weight[..., 1::5, :].abs()
    weight[..., 3, :] = 0
    weight[..., 4, 7] = 30
    return weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_full_range_is_compressed_tensors_own(bits: int, symmetric: bool) -> None:
    weight = weights(12, 64)
    weight[3] = 1e-3  # compressed-tensors divides 0 by 0 for the zero point of zeros
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=QuantizationStrategy.GROUP, group_size=16)
    groups = weight.unflatten(-1, (-1, 16))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    ours = rtn(weight, Grid(bits, 16, symmetric), scale_dtype=torch.float32)
    torch.testing.assert_close(ours.scale, scale)
    if symmetric:
        assert ours.zero_point is None
    else:
        assert ours.zero_point is not None and torch.equal(ours.zero_point, zero)
    theirs = their_quantize(weight, ours.scale, zero, args, dtype=torch.int8)
    assert torch.equal(ours.codes, theirs)


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_the_nearest_on_the_stored_scale(bits: int, scale_dtype: torch.dtype) -> None:
    weight = weights(2, 12, 32)
    for symmetric in (True, False) if bits > 1 else (True,):
        ours = rtn(weight, Grid(bits, 8, symmetric), scale_dtype=scale_dtype, search_steps=3)
        assert ours.scale.dtype == scale_dtype and ours.codes.dtype == torch.int8
        assert ours.scale.shape == (2, 12, 4) and ours.codes.shape == weight.shape
        # All values of the grid, [2, 12, 32, codes], in float32: nothing on it is nearer than what was chosen.
        codes = torch.arange(ours.grid.lowest, ours.grid.highest + 1).float()
        if bits == 1:
            codes = torch.tensor([-1.0, 1.0])
        zero = 0 if ours.zero_point is None else ours.zero_point.repeat_interleave(8, -1).unsqueeze(-1)
        values = (codes - zero) * ours.scale.float().repeat_interleave(8, -1).unsqueeze(-1)
        index = ours.codes.long() - ours.grid.lowest
        chosen = values.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        nearest = (values - weight.unsqueeze(-1)).abs().amin(-1)
        torch.testing.assert_close((chosen - weight).abs(), nearest, atol=1e-6, rtol=1e-5)
        assert torch.equal(ours.dequantize(), chosen.to(scale_dtype).float())
        assert ours.dequantize(torch.float16).dtype == torch.float16


def test_zeros_stay_zeros() -> None:
    for bits in range(1, 9):
        for scale_dtype in DTYPES:
            assert not rtn(torch.zeros(4, 16), Grid(bits, 8, True), scale_dtype=scale_dtype).dequantize().any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_search_keeps_the_best_of_its_ranges(symmetric: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "CPU_CHUNK", 50)  # rows do not fit a chunk
    weight = weights(3, 12, 32, seed=1)
    importance = torch.rand(3, 32) if weighted else torch.ones(3, 32)
    grid = Grid(3, 16, symmetric)
    importances = importance[:, None] if weighted else None
    scale, zero = fit(weight, grid, scale_dtype=torch.bfloat16, search_steps=7, importance=importances)

    def error(scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        values = Quantized(grid, encode(weight, scale, zero, grid), scale.float(), zero).dequantize()
        return ((values - weight).square() * importance[:, None]).unflatten(-1, (2, 16)).sum(-1)

    found = error(scale, zero)
    assert (found < error(*fit(weight, grid, scale_dtype=torch.bfloat16)) * 0.9).any()
    groups = weight.unflatten(-1, (2, 16))
    for share in torch.linspace(1, 0.3, 8).tolist():
        ends = torch.stack([groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)], -1) * share
        tried = fit(ends.reshape(3, 12, 4), Grid(3, 2, symmetric), scale_dtype=torch.bfloat16)
        assert (found <= error(*tried) * 1.0001 + 1e-9).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_long_search_is_no_worse_than_trying_all_its_ranges(bits: int, symmetric: bool) -> None:
    """Brute force in float64 over 20 ranges, summed over many groups; few are more than a tenth worse."""
    weight = torch.randn(4, 50, 128, generator=torch.Generator().manual_seed(2))
    importance = torch.rand(4, 1, 128, generator=torch.Generator().manual_seed(3)) ** 2 + 0.05
    grid, steps = Grid(bits, 64, symmetric), 20
    scale, zero = fit(weight, grid, scale_dtype=torch.bfloat16, search_steps=steps, importance=importance)
    groups, weighing = weight.double().unflatten(-1, (2, 64)), importance.double().unflatten(-1, (2, 64))

    def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        steps = (groups / scale[..., None] + zero[..., None]).round().clamp(grid.lowest, grid.highest)
        return (((steps - zero[..., None]) * scale[..., None] - groups).square() * weighing).sum(-1)

    found = error(scale.double(), torch.zeros(()).expand_as(scale) if zero is None else zero.double())
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    tried = []
    for step in range(steps + 1):
        share = 1 - 0.7 * step / steps
        size = 2 * torch.maximum(-low, high) if symmetric else high - low
        one = (size * share / (2**bits - 1)).to(torch.bfloat16).double()
        shift = (grid.lowest - low * share / one).round().clamp(grid.lowest, grid.highest)
        tried.append(error(one, torch.zeros_like(one) if symmetric else shift))
    least = torch.stack(tried).amin(0)
    assert found.sum() <= (1.002 if bits == 2 else 1) * least.sum()
    assert (found > 1.1 * least).double().mean() < 0.01
    assert found.sum() < 0.95 * tried[0].sum()


def test_one_bit_takes_the_weighted_mean() -> None:
    weight, importance = weights(2, 8, 16), torch.rand(2, 16)
    plain = rtn(weight, Grid(1, 16, True), scale_dtype=torch.float32)
    torch.testing.assert_close(plain.scale.squeeze(-1), weight.abs().mean(-1))
    assert torch.equal(plain.dequantize(), torch.where(weight < 0, -1.0, 1.0) * plain.scale)
    scale, _ = fit(weight, Grid(1, None, True), scale_dtype=torch.float32, importance=importance)
    expected = (weight.abs() * importance[:, None]).sum(-1) / importance.sum(-1)[:, None]
    torch.testing.assert_close(scale.squeeze(-1), expected)


def test_split_gives_the_rows_of_each() -> None:
    weight = weights(2, 12, 32)
    for symmetric in (True, False):
        whole = rtn(weight, Grid(3, 16, symmetric), scale_dtype=torch.bfloat16)
        first, second = whole.split([4, 8])
        assert torch.equal(torch.cat([first.dequantize(), second.dequantize()], dim=1), whole.dequantize())
        assert first.codes.shape == (2, 4, 32) and second.scale.shape == (2, 8, 2)


def test_any_float_dtype_and_leading_shape() -> None:
    weight = weights(2, 3, 8, 16).bfloat16()
    grid = Grid(4, 8, False)
    whole = rtn(weight, grid, scale_dtype=torch.bfloat16, search_steps=5)
    alone = rtn(weight[1, 2], grid, scale_dtype=torch.bfloat16, search_steps=5)
    assert torch.equal(whole.codes[1, 2], alone.codes) and torch.equal(whole.scale[1, 2], alone.scale)
    assert whole.zero_point is not None and alone.zero_point is not None
    assert torch.equal(whole.zero_point[1, 2], alone.zero_point)


def test_errors_are_sentences() -> None:
    with pytest.raises(UsageError, match=r"bits is 9; choose 1 to 8\."):
        Grid(9, 32, True)
    with pytest.raises(UsageError, match="1 bit has no zero point"):
        Grid(1, 32, False)
    with pytest.raises(UsageError, match="group_size is 0"):
        Grid(4, 0, True)
    with pytest.raises(
        UsageError,
        match=r"layer 3 has 96 input channels, which group_size 64 .* 8, 12, 16, 24, 32, 48, 96, or `channel`",
    ):
        check_group_size(Grid(4, 64, True), 96, "layer 3")
    check_group_size(Grid(4, None, True), 97, "layer 3")
    weight = torch.ones(4, 8)
    check_finite(weight * 3e38, "w")
    weight[1, 2], weight[3, 0] = float("nan"), float("-inf")
    with pytest.raises(CheckpointError, match="expert 5 holds 2 values that are NaN or infinite"):
        rtn(weight, Grid(4, 8, True), scale_dtype=torch.float32, what="expert 5")
