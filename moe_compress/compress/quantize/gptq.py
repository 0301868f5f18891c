"""GPTQ (arXiv 2210.17323) over all experts of a layer at once: rounding that the later columns make up for.

For the error tr(dW H dW^T) of a layer's output, with H the second moment of its inputs, columns (input channels) are
rounded from first to last, and the error of each is spread over those not yet rounded, by the upper Cholesky factor U
of H^-1 = U^T U. U is the inverse of the upper triangular R with H = R R^T: one factorisation of H, from its last
column to its first, which keeps more digits than inverting H and factorising again. Experts are a batch dimension
throughout; only columns and chunks of experts are looped over.

Groups are fitted when their first column is reached, from weights that already make up for the columns before. With
`act_order` columns are taken by falling diag(H) instead, and the groups, contiguous as stored, are fitted beforehand
from the original weights (compressed-tensors' "static" order: no index is stored, every loader reads it).
The scale search weighs the squared error of column j by 1 / U_jj^2, which is what GPTQ's loss weighs it by.
An input channel that was always 0 is rounded to nearest and moves no other: without data GPTQ is round to nearest.
Tensor names: E experts, O output channels, I input channels, G groups of a row, B columns of a block, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compress.errors import DataError
from moe_compress.models.linear import ROWS, linear
from moe_compress.runtime.grid import (
    Grid,
    Quantized,
    check_finite,
    check_group_size,
    code_values,
    fit,
    round_to_codes,
)

# Smallest damping after a factorisation failed with none.
LEAST_DAMPING = 1e-6
# Up to this many columns are factorised directly.
SMALL_TRIANGLE = 32
# Rows of a second moment are added up in so many panels, none lower than this.
PANELS = 8
LEAST_PANEL = 128
# Of a chunk of experts: little enough to stay in reused memory, which is faster, or what keeps an accelerator busy.
CPU_MEMORY = 1 << 26
DEVICE_MEMORY = 1 << 30
# Tokens an expert needs for a second moment of its own.
POOL_BELOW = 128


@dataclass(frozen=True, eq=False)
class GPTQResult:
    """The quantized experts; for each of them the damping it needed and what GPTQ minimises.

    damping_E: float64, share of the mean of diag(H) added to it; above what was asked where H could not be factorised.
    loss_E: float32, tr(dW (H + damping) dW^T), in the units of H.
    """

    quantized: Quantized
    damping_E: Tensor
    loss_E: Tensor


class Hessians:
    """Sums of x x^T over the inputs x of every expert of a layer; float32 [E, I, I] on `device`."""

    def __init__(self, num_experts: int, width: int, device: torch.device | str = "cpu") -> None:
        self.sums_EII = torch.zeros(num_experts, width, width, device=device)
        self.tokens = [0] * num_experts

    def add(self, expert: int, inputs_NI: Tensor) -> None:
        """Count the tokens [N, I] that reached `expert`; any float dtype, on the device of the sums."""
        count = len(inputs_NI)
        inputs_IN = F.pad(inputs_NI.float(), (0, 0, 0, -count % ROWS)).T.contiguous()
        for start, end in self._panels():  # on and above the diagonal; the rest is the same
            self.sums_EII[expert, start:end, start:] += linear(inputs_IN[start:end], inputs_IN[start:])
        self.tokens[expert] += count

    def finish(self, min_tokens: int) -> tuple[Tensor, list[int]]:
        """Means of x x^T [E, I, I], and the experts with fewer than `min_tokens` tokens, whose mean was pooled.

        With n tokens such an expert gets n/min_tokens of its own mean and the rest of the pool: the mean over the
        experts with enough tokens (any tokens, if none has enough), each scaled to a mean diagonal of 1, then scaled to
        the expert's own. Reuses the memory of the sums; call it once.
        """
        device = self.sums_EII.device
        for start, end in self._panels():
            self.sums_EII[:, end:, start:end] = self.sums_EII[:, start:end, end:].transpose(1, 2)
        tokens_E = torch.tensor(self.tokens, device=device)
        means_EII = self.sums_EII.div_(tokens_E.clamp(min=1)[:, None, None])
        size_E = means_EII.diagonal(dim1=1, dim2=2).mean(-1)
        starved = [expert for expert, count in enumerate(self.tokens) if count < min_tokens]
        if not starved:
            return means_EII, starved
        donor_E = (tokens_E >= min_tokens) & (size_E > 0)
        if not donor_E.any():
            donor_E = size_E > 0
        share_E = donor_E / donor_E.sum().clamp(min=1)
        size_of_pool = (share_E * size_E).sum()
        size_E = torch.where(size_E > 0, size_E, size_of_pool)
        pool_II = torch.tensordot(torch.where(donor_E, share_E / size_E, 0.0), means_EII, dims=1)
        for expert in starved:
            means_EII[expert].lerp_(pool_II * size_E[expert], 1 - self.tokens[expert] / min_tokens)
        return means_EII, starved

    def _panels(self) -> Iterator[tuple[int, int]]:
        """First and last row of each of the panels that the sums are added up in."""
        width = self.sums_EII.shape[1]
        height = max(LEAST_PANEL, -(-width // PANELS))
        return ((start, min(start + height, width)) for start in range(0, width, height))


def gptq(
    weight_EOI: Tensor,
    hessian_EII: Tensor,
    grid: Grid,
    *,
    scale_dtype: torch.dtype,
    search_steps: int = 0,
    act_order: bool = False,
    damping: float = 0.01,
    block_size: int = 32,
    memory_limit_bytes: int | None = None,
    what: str = "the weight",
) -> GPTQResult:
    """Quantize float weights [E, O, I] given the second moments [E, I, I] of their inputs; changes neither.

    `search_steps` as in `fit`; `damping` is the share of the mean of diag(H) added to it, and grows tenfold, from
    float64 on, for an expert whose H cannot be factorised. Columns are updated in blocks of `block_size`, experts taken
    in chunks that need at most `memory_limit_bytes` beside arguments and result (or what one expert needs; None: a
    limit beyond which nothing gets faster); neither changes more than rounding noise. Raises `UsageError` when the
    group size does not divide I, `CheckpointError` on a weight and `DataError` on a Hessian that is not finite, naming
    `what`.
    """
    num_experts, num_outputs, width = weight_EOI.shape
    assert hessian_EII.shape == (num_experts, width, width)
    check_group_size(grid, width, what)
    check_finite(weight_EOI, what)
    if not torch.isfinite(hessian_EII.diagonal(dim1=1, dim2=2)).all():
        raise DataError(f"the calibration inputs of {what} overflow or hold NaN; calibrate in float32 or bfloat16.")
    if memory_limit_bytes is None:
        memory_limit_bytes = CPU_MEMORY if weight_EOI.device.type == "cpu" else DEVICE_MEMORY
    # Two squares and two quarters while factorising, the weights with what their update needs, codes twice.
    chunk_bytes = 10 * width * width + 10 * num_outputs * width
    chunk = max(1, memory_limit_bytes // chunk_bytes)
    codes_EOI = torch.empty(weight_EOI.shape, dtype=torch.int8, device=weight_EOI.device)
    scales, zeros, dampings, losses = [], [], [], []
    for start in range(0, num_experts, chunk):
        part = slice(start, start + chunk)
        columns = _Columns(weight_EOI[part], hessian_EII[part], grid, scale_dtype, search_steps, act_order, damping)
        losses.append(columns.quantize(block_size))
        codes_EOI[part] = columns.codes_EOI()
        scales.append(columns.scale_EGO.transpose(1, 2).to(scale_dtype))
        if columns.zero_EGO is not None:
            zeros.append(columns.zero_EGO.transpose(1, 2).to(torch.int8))
        dampings.append(columns.damping_E)
    zero_point = torch.cat(zeros).contiguous() if zeros else None
    quantized = Quantized(grid, codes_EOI, torch.cat(scales).contiguous(), zero_point)
    return GPTQResult(quantized, torch.cat(dampings), torch.cat(losses))


class _Columns:
    """A chunk of experts, transposed so that a column of all of them is one contiguous [E, O], in rounding order."""

    def __init__(
        self,
        weight_EOI: Tensor,
        hessian_EII: Tensor,
        grid: Grid,
        scale_dtype: torch.dtype,
        search_steps: int,
        act_order: bool,
        damping: float,
    ) -> None:
        num_experts, num_outputs, width = weight_EOI.shape
        self.grid, self.scale_dtype, self.search_steps = grid, scale_dtype, search_steps
        self.group_size = width if grid.group_size is None else grid.group_size
        device = weight_EOI.device
        hessian_EII = hessian_EII.float()
        self.order_EI = None
        self.group_EI = (torch.arange(width, device=device) // self.group_size).expand(num_experts, -1)
        weight_EIO = weight_EOI.transpose(1, 2)
        if act_order:
            diagonal_EI = hessian_EII.diagonal(dim1=1, dim2=2)
            order_EI = self.order_EI = diagonal_EI.argsort(dim=1, descending=True, stable=True)
            self.group_EI = order_EI // self.group_size
            hessian_EII = hessian_EII.gather(1, order_EI[:, :, None].expand_as(hessian_EII))
            hessian_EII = hessian_EII.gather(2, order_EI[:, None, :].expand_as(hessian_EII))
            weight_EIO = weight_EIO.gather(1, order_EI[:, :, None].expand_as(weight_EIO))
        self.factor_EII, self.damping_E = inverse_factor(hessian_EII, damping)
        self.importance_EI = self.factor_EII.diagonal(dim1=1, dim2=2).pow(-2)
        self.weight_EIO = torch.empty(weight_EIO.shape, device=device).copy_(weight_EIO)
        self.codes_EIO = torch.empty(weight_EIO.shape, dtype=torch.int8, device=device)
        self.scale_EGO = torch.empty(num_experts, width // self.group_size, num_outputs, device=device)
        self.zero_EGO = None if grid.symmetric else torch.empty_like(self.scale_EGO)
        if self.order_EI is not None:
            stored_EI = torch.empty_like(self.importance_EI).scatter_(1, self.order_EI, self.importance_EI)
            self._fit(weight_EOI, stored_EI, slice(None))

    def quantize(self, block_size: int) -> Tensor:
        """Round every column, block by block; the loss [E]."""
        num_experts, width, num_outputs = self.weight_EIO.shape
        experts_E1 = torch.arange(num_experts, device=self.weight_EIO.device)[:, None]
        loss_E = self.scale_EGO.new_zeros(num_experts)
        errors_EBO = self.scale_EGO.new_empty(num_experts, min(block_size, self.group_size), num_outputs)
        start = 0
        while start < width:
            group, offset = divmod(start, self.group_size)
            end = start + min(block_size, self.group_size - offset)
            if offset == 0 and self.order_EI is None:
                columns = slice(start, start + self.group_size)
                weight_EOg = self.weight_EIO[:, columns].transpose(1, 2)
                self._fit(weight_EOg, self.importance_EI[:, columns], slice(group, group + 1))
            group_EB = self.group_EI[:, start:end]
            scale_EBO = self.scale_EGO[experts_E1, group_EB]
            zero_EBO = None if self.zero_EGO is None else self.zero_EGO[experts_E1, group_EB]
            errors = errors_EBO[:, : end - start]
            self._round_block(start, end, scale_EBO, zero_EBO, errors)
            loss_E += errors.square().sum((1, 2))
            self.weight_EIO[:, end:].baddbmm_(self.factor_EII[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
            start = end
        return loss_E

    def codes_EOI(self) -> Tensor:
        """The codes, columns in their original order."""
        codes_EIO = self.codes_EIO
        if self.order_EI is not None:
            codes_EIO = torch.empty_like(codes_EIO).scatter_(
                1, self.order_EI[:, :, None].expand_as(codes_EIO), codes_EIO
            )
        return codes_EIO.transpose(1, 2)

    def _fit(self, weight_EOI: Tensor, importance_EI: Tensor, groups: slice) -> None:
        """Choose the grid of `groups` from their weights, whole groups in stored order."""
        grid = Grid(self.grid.bits, self.group_size, self.grid.symmetric)
        scale_EOG, zero_EOG = fit(
            weight_EOI,
            grid,
            scale_dtype=self.scale_dtype,
            search_steps=self.search_steps,
            importance=importance_EI,
        )
        self.scale_EGO[:, groups] = scale_EOG.transpose(1, 2).float()
        if self.zero_EGO is not None and zero_EOG is not None:
            self.zero_EGO[:, groups] = zero_EOG.transpose(1, 2).float()

    def _round_block(
        self, start: int, end: int, scale_EBO: Tensor, zero_EBO: Tensor | None, errors_EBO: Tensor
    ) -> None:
        """Round columns `start` to `end`, each making up for those before it; `errors_EBO` takes (w - q) / U_jj."""
        factor_EBB = self.factor_EII[:, start:end, start:end].contiguous()
        inverse_EB1 = factor_EBB.diagonal(dim1=1, dim2=2).reciprocal().unsqueeze(-1)
        block_EBO = self.weight_EIO[:, start:end]
        for j in range(end - start):
            column_EO, scale_EO = block_EBO[:, j], scale_EBO[:, j]
            zero_EO = None if zero_EBO is None else zero_EBO[:, j]
            codes_EO = round_to_codes(column_EO, scale_EO, zero_EO, self.grid)
            values_EO = code_values(codes_EO, scale_EO, zero_EO, self.grid, self.scale_dtype)
            self.codes_EIO[:, start + j] = codes_EO
            torch.mul(column_EO - values_EO, inverse_EB1[:, j], out=errors_EBO[:, j])
            block_EBO[:, j + 1 :].addcmul_(factor_EBB[:, j, j + 1 :, None], errors_EBO[:, j : j + 1], value=-1)


def inverse_factor(hessian_EII: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Upper U [E, I, I], U^T U = (H + damping * mean of its diagonal)^-1, and the damping used, float64 [E].

    Where the diagonal of H (float32) is 0 it counts as the mean, which rounds that column alone.
    """
    diagonal_EI = hessian_EII.diagonal(dim1=1, dim2=2)
    live_EI = diagonal_EI > 0
    mean_E1 = (diagonal_EI * live_EI).sum(1, keepdim=True) / live_EI.sum(1, keepdim=True).clamp(min=1)
    mean_E1 = torch.where(mean_E1 > 0, mean_E1, 1.0)
    diagonal_EI = torch.where(live_EI, diagonal_EI, mean_E1)
    damping_E = torch.full(mean_E1.shape[:1], damping, dtype=torch.float64, device=hessian_EII.device)

    def factorise(experts: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        damped_EII = hessian_EII[experts].to(dtype, copy=True)
        added_E1 = damping_E[experts, None] * mean_E1[experts]
        damped_EII.diagonal(dim1=1, dim2=2).copy_(diagonal_EI[experts].to(dtype) + added_E1.to(dtype))
        factor_EII = torch.zeros_like(damped_EII)
        return factor_EII, _factorise(damped_EII, factor_EII)

    factor_EII, failed_E = factorise(slice(None), torch.float32)
    failed = failed_E.nonzero().flatten()
    while len(failed):
        factor, still = factorise(failed, torch.float64)
        factor_EII[failed[~still]] = factor[~still].float()
        failed = failed[still]
        damping_E[failed] = (damping_E[failed] * 10).clamp(min=LEAST_DAMPING)
    return factor_EII, damping_E


def _factorise(matrix_EII: Tensor, factor_EII: Tensor) -> Tensor:
    """Write U = R^-1 for R R^T = matrix into `factor_EII` (zeros); whether that failed, [E]. Overwrites the matrix.

    By halves, the last columns first, which makes most of it matrix products; reads what lies above the diagonal.
    """
    size = matrix_EII.shape[-1]
    if size <= SMALL_TRIANGLE:
        # Last row and column first, so that the lower factor is R read backwards.
        lower_EII, info = torch.linalg.cholesky_ex(matrix_EII.flip(1, 2).mT)
        identity = torch.eye(size, dtype=lower_EII.dtype, device=lower_EII.device).expand_as(lower_EII)
        factor_EII.copy_(torch.linalg.solve_triangular(lower_EII, identity, upper=False).flip(1, 2))
        return info != 0  # type: ignore[no-any-return]
    first, last = slice(0, size // 2), slice(size // 2, size)
    failed_E: Tensor = _factorise(matrix_EII[:, last, last], factor_EII[:, last, last])
    off_EII = matrix_EII[:, first, last] @ factor_EII[:, last, last].mT  # R above the diagonal
    matrix_EII[:, first, first].baddbmm_(off_EII, off_EII.mT, alpha=-1)
    failed_E |= _factorise(matrix_EII[:, first, first], factor_EII[:, first, first])
    torch.baddbmm(
        factor_EII[:, first, last], factor_EII[:, first, first], off_EII @ factor_EII[:, last, last], beta=0, alpha=-1,
        out=factor_EII[:, first, last],
    )  # fmt: skip
    return failed_E
