"""Batched GPTQ against a plain one of single matrices in float64, against rounding, and against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compress.compress.quantize.gptq import Hessians, gptq, inverse_factor
from moe_compress.compress.quantize.rtn import rtn
from moe_compress.errors import CheckpointError, DataError, UsageError
from moe_compress.runtime.grid import Grid, Quantized

GRIDS = [Grid(1, 16, True)] + [Grid(b, 16, s) for b in (2, 3, 4, 8) for s in (True, False)] + [Grid(3, None, False)]


def layer(experts: int = 3, outputs: int = 24, width: int = 48, tokens: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [E, O, I], inputs [E, N, I] of correlated channels of unequal size, their second moments [E, I, I]."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(experts, outputs, width, generator=generator) * 0.1
    causes = torch.randn(experts, tokens, width // 4, generator=generator)
    mixing = torch.randn(experts, width // 4, width, generator=generator) * torch.linspace(0.1, 1, width)
    inputs = causes @ mixing + 0.3 * torch.randn(experts, tokens, width, generator=generator)
    return weight, inputs, inputs.transpose(1, 2) @ inputs / tokens


def plain_gptq(weight: Tensor, hessian: Tensor, grid: Grid, steps: int, act_order: bool, damping: float) -> Quantized:
    """One matrix [O, I] in float64, by the book: the inverse Hessian is updated column by column, nothing blocked."""
    weight, hessian = weight.double().clone(), hessian.double()
    outputs, width = weight.shape
    size = grid.group_size or width
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist() if act_order else list(range(width))
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(width))
    # Column j's weight in the loss is the reciprocal of its entry in the inverse of what is not yet rounded.
    importance, remaining = torch.zeros(width, dtype=torch.float64), inverse.clone()
    for j in order:
        importance[j] = 1 / remaining[j, j]
        remaining = remaining - remaining[:, j : j + 1] @ remaining[j : j + 1] / remaining[j, j]
    codes = torch.zeros(outputs, width, dtype=torch.int8)
    scale, zero = torch.zeros(2, outputs, width // size, dtype=torch.float64)

    def choose(group: int) -> None:
        columns = slice(group * size, (group + 1) * size)
        for row in range(outputs):
            scale[row, group], zero[row, group] = plain_fit(weight[row, columns], importance[columns], grid, steps)

    if act_order:
        for group in range(width // size):
            choose(group)
    for j in order:
        if not act_order and j % size == 0:
            choose(j // size)
        step, shift = scale[:, j // size], zero[:, j // size]
        code = torch.round((weight[:, j] / step + shift).clamp(grid.lowest, grid.highest))
        value = (code - shift) * step
        if grid.bits == 1:
            code = -(weight[:, j] < 0).double()
            value = (2 * code + 1) * step
        codes[:, j] = code.to(torch.int8)
        error = (weight[:, j] - rounded(value)) / inverse[j, j]
        weight -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return Quantized(grid, codes, scale.to(torch.bfloat16), None if grid.symmetric else zero.to(torch.int8))


def rounded(value: Tensor | float) -> Tensor:
    """As stored: in bfloat16. (In float32 the largest weight of a symmetric group is a tie, halfway between codes.)"""
    return torch.as_tensor(value).to(torch.bfloat16).double()


def plain_fit(group: Tensor, importance: Tensor, grid: Grid, steps: int) -> tuple[float, float]:
    if grid.bits == 1:
        return float(rounded((group.abs() * importance).sum() / importance.sum())), 0.0
    best = (float("inf"), 0.0, 0.0)
    for number in range(steps + 1):
        share = 1 - 0.7 * number / max(steps, 1)
        low, high = min(float(group.min()), 0) * share, max(float(group.max()), 0) * share
        levels = 2**grid.bits - 1
        scale = 2 * max(-low, high) / levels if grid.symmetric else (high - low) / levels
        scale = float(rounded(scale))
        zero = 0.0 if grid.symmetric else max(grid.lowest, min(grid.highest, round(grid.lowest - low / scale)))
        values = (torch.round(group / scale + zero).clamp(grid.lowest, grid.highest) - zero) * scale
        error = float(((values - group).square() * importance).sum())
        best = min(best, (error, scale, zero), key=lambda found: found[0])
    return best[1], best[2]


def output_error(quantized: Quantized, weight: Tensor, inputs: Tensor) -> Tensor:
    """Squared error of the layer's output per expert, [E] (or of one expert, [])."""
    difference = quantized.dequantize(torch.float64) - weight.double()
    return (inputs.double() @ difference.mT).square().sum((-1, -2))


def check_equal(left: Quantized, right: Quantized) -> None:
    assert torch.equal(left.codes, right.codes) and torch.equal(left.scale, right.scale)
    assert (left.zero_point is None) == (right.zero_point is None)
    assert left.zero_point is None or torch.equal(left.zero_point, right.zero_point)  # type: ignore[arg-type]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_a_plain_implementation(grid: Grid, steps: int, act_order: bool) -> None:
    weight, inputs, hessian = layer()
    ours = gptq(
        weight, hessian, grid, scale_dtype=torch.bfloat16, search_steps=steps, act_order=act_order, block_size=7
    ).quantized
    for expert in range(len(weight)):
        plain = plain_gptq(weight[expert], hessian[expert], grid, steps, act_order, 0.01)
        # A tie that float32 and float64 break differently moves what follows in its row.
        assert (ours.codes[expert] != plain.codes).float().mean() < 0.01
        zero = None if ours.zero_point is None else ours.zero_point[expert]
        one = Quantized(grid, ours.codes[expert], ours.scale[expert], zero)
        found, expected = (output_error(q, weight[expert], inputs[expert]) for q in (one, plain))
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("bits", range(1, 9))
def test_better_than_rounding_on_correlated_inputs(bits: int) -> None:
    weight, inputs, hessian = layer()
    for symmetric in (True, False) if bits > 1 else (True,):
        for steps in (0, 10):
            settings: dict[str, Any] = {"scale_dtype": torch.bfloat16, "search_steps": steps}
            nearest = output_error(rtn(weight, Grid(bits, 16, symmetric), **settings), weight, inputs)
            for act_order in (False, True):
                found = gptq(weight, hessian, Grid(bits, 16, symmetric), act_order=act_order, **settings)
                assert (output_error(found.quantized, weight, inputs) < 0.9 * nearest).all()


def test_loss_is_what_it_says() -> None:
    weight, _, hessian = layer()
    for act_order in (False, True):
        found = gptq(weight, hessian, Grid(2, 16, False), scale_dtype=torch.bfloat16, act_order=act_order)
        difference = found.quantized.dequantize() - weight
        damped = hessian + 0.01 * hessian.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(48)
        expected = torch.einsum("eoi,eij,eoj->e", difference, damped, difference)
        torch.testing.assert_close(found.loss_E, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
def test_batches_chunks_and_blocks_change_nothing(act_order: bool) -> None:
    weight, _, hessian = layer()
    settings: dict[str, Any] = {"scale_dtype": torch.bfloat16, "search_steps": 4, "act_order": act_order}
    grid = Grid(4, 16, False)
    whole = gptq(weight, hessian, grid, **settings)
    one_by_one = [gptq(weight[e : e + 1], hessian[e : e + 1], grid, **settings).quantized for e in range(len(weight))]
    zeros = [q.zero_point for q in one_by_one if q.zero_point is not None]
    codes, scales = torch.cat([q.codes for q in one_by_one]), torch.cat([q.scale for q in one_by_one])
    check_equal(whole.quantized, Quantized(grid, codes, scales, torch.cat(zeros)))
    check_equal(whole.quantized, gptq(weight, hessian, grid, memory_limit_bytes=1, **settings).quantized)
    blocked = gptq(weight, hessian, grid, block_size=128, **settings)
    torch.testing.assert_close(blocked.loss_E, whole.loss_E, rtol=1e-2, atol=0)


def test_without_data_it_is_rounding() -> None:
    weight, _, hessian = layer()
    grid = Grid(3, 16, True)
    nearest = rtn(weight, grid, scale_dtype=torch.float32, search_steps=4)
    before = torch.zeros_like(hessian)
    found = gptq(weight, before, grid, scale_dtype=torch.float32, search_steps=4)
    check_equal(found.quantized, nearest)
    assert not before.any(), "the argument was changed"
    # Channels that are always 0 are rounded, and the others do as if they were not there.
    dead = torch.zeros(48, dtype=torch.bool)
    dead[16:32] = True
    hessian[:, dead] = 0
    hessian[:, :, dead] = 0
    found = gptq(weight, hessian, grid, scale_dtype=torch.float32)
    nearest = rtn(weight, grid, scale_dtype=torch.float32)
    assert torch.equal(found.quantized.codes[:, :, dead], nearest.codes[:, :, dead])
    alone = gptq(weight[:, :, ~dead], hessian[:, ~dead][:, :, ~dead], grid, scale_dtype=torch.float32)
    assert torch.equal(found.quantized.codes[:, :, ~dead], alone.quantized.codes)


def test_what_cannot_be_factorised_is_damped_more() -> None:
    weight, _, hessian = layer()
    # Rank 2 in float32 without damping, and, worse, not even positive: 0.03 below zero in one direction.
    hessian[0] = torch.outer(torch.ones(48), torch.ones(48))
    hessian[2] = torch.eye(48) - torch.outer(torch.ones(48), torch.ones(48)) * (1.03 / 48)
    found = gptq(weight, hessian, Grid(4, 16, True), scale_dtype=torch.float32, damping=0.0)
    assert found.damping_E[1] == 0 and 0 < found.damping_E[0] <= 1e-5 and 0.03 < found.damping_E[2] <= 0.31
    assert torch.isfinite(found.loss_E).all() and found.damping_E.dtype == torch.float64
    alone = gptq(weight[1:2], hessian[1:2], Grid(4, 16, True), scale_dtype=torch.float32, damping=0.0)
    assert torch.equal(alone.quantized.codes[0], found.quantized.codes[1])


def test_factor_of_the_inverse() -> None:
    _, _, hessian = layer(width=200, tokens=400)
    factor, damping = inverse_factor(hessian.clone(), 0.02)
    assert torch.equal(factor, factor.triu()) and (damping == 0.02).all()
    damped = hessian.double() + torch.eye(200) * 0.02 * hessian.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_errors_name_the_tensor() -> None:
    weight, _, hessian = layer()
    with pytest.raises(UsageError, match="layer 1 has 48 input channels"):
        gptq(weight, hessian, Grid(4, 32, True), scale_dtype=torch.float32, what="layer 1")
    hessian[1, 3, 3] = float("inf")
    with pytest.raises(DataError, match="the calibration inputs of layer 1 overflow"):
        gptq(weight, hessian, Grid(4, 16, True), scale_dtype=torch.float32, what="layer 1")
    weight[0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="layer 1 holds 1 values"):
        gptq(weight, hessian, Grid(4, 16, True), scale_dtype=torch.float32, what="layer 1")


def test_hessians_are_means_of_outer_products() -> None:
    _, inputs, hessian = layer()
    hessians = Hessians(3, 48)
    for expert in range(3):
        for part in inputs[expert].split(70):
            hessians.add(expert, part)
    found, starved = hessians.finish(300)
    assert starved == []
    torch.testing.assert_close(found, hessian)


def test_starved_experts_share_the_pool() -> None:
    _, inputs, hessian = layer(experts=4)
    hessians = Hessians(4, 48)
    for expert, count in enumerate((300, 300, 30, 0)):
        hessians.add(expert, inputs[expert, :count])
    found, starved = hessians.finish(100)
    assert starved == [2, 3]
    torch.testing.assert_close(found[:2], hessian[:2])

    def size(matrix: Tensor) -> Tensor:
        return matrix.diagonal().mean()

    pool = sum(hessian[e] / size(hessian[e]) for e in (0, 1)) / 2
    own = inputs[2, :30].T @ inputs[2, :30] / 30
    torch.testing.assert_close(found[2], 0.3 * own + 0.7 * pool * size(own))
    torch.testing.assert_close(found[3], pool * (size(hessian[0]) + size(hessian[1])) / 2)


def test_pool_of_the_starved_and_of_nothing() -> None:
    _, inputs, _ = layer()
    hessians = Hessians(3, 48)
    hessians.add(1, inputs[1, :40])
    found, starved = hessians.finish(100)
    assert starved == [0, 1, 2]
    own = inputs[1, :40].T @ inputs[1, :40] / 40
    for expert in range(3):
        torch.testing.assert_close(found[expert], own)
    empty, starved = Hessians(2, 8).finish(1)
    assert starved == [0, 1] and not empty.any()
