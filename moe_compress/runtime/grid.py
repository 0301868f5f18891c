"""The grid a group of weights is rounded to: how it is chosen, and the way from weights to codes and back.

Codes, scales and zero points follow compressed-tensors' pack-quantized convention: signed codes from -2^(b-1) to
2^(b-1) - 1, value = (code - zero point) * scale. As in its `calculate_qparams`, the range of a group always holds 0
(an asymmetric zero point must itself be a code), a symmetric scale is max|w| / (2^(b-1) - 1/2), so that the full range
has 2^b - 1 steps, and an asymmetric one (max - min) / (2^b - 1). One bit is ours alone: code -1 or 0 stands for -scale
or +scale, scale = mean|w| of the group. Every scale is rounded to the dtype it is stored in before a code is computed
with it, and every value to the same dtype, as compressed-tensors does on loading.
Tensor names: O output channels, I input channels, G groups of a row. Packing is in `pack`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.errors import CheckpointError, UsageError

# The narrowest range the search tries, as a share of the full one.
NARROWEST_RANGE = 0.3
# Ranges looked at first, at least, before those between the best of them and its neighbours.
COARSE_STEPS = 5
# Weights worked on at a time: on a CPU what stays near its caches (and is not fresh memory at every use, which costs
# more than the work), elsewhere what bounds the extra memory.
CPU_CHUNK = 1 << 18
DEVICE_CHUNK = 1 << 26


@dataclass(frozen=True)
class Grid:
    """Bits per weight, input channels that share a scale (None: all of a row), and whether zero points exist."""

    bits: int
    group_size: int | None
    symmetric: bool

    def __post_init__(self) -> None:
        """Raises `UsageError` for what no grid can be."""
        if not 1 <= self.bits <= 8:
            raise UsageError(f"bits is {self.bits}; choose 1 to 8.")
        if self.bits == 1 and not self.symmetric:
            raise UsageError("1 bit has no zero point; set symmetric to true or take 2 bits.")
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(f"group_size is {self.group_size}; choose 1 or more, or `channel`.")

    @property
    def lowest(self) -> int:
        """The least code."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The greatest code."""
        return (1 << (self.bits - 1)) - 1

    def num_groups(self, width: int) -> int:
        """Groups in a row of `width` input channels, which `check_group_size` has accepted."""
        return 1 if self.group_size is None else width // self.group_size


@dataclass(frozen=True, eq=False)
class Quantized:
    """Codes int8 [..., O, I], scale [..., O, G] in its stored dtype, zero point int8 [..., O, G] or None."""

    grid: Grid
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [..., O, I]: rounded to the scale's dtype, as every loader does, then cast to `dtype`."""
        groups: Tensor = self.codes.unflatten(-1, (self.scale.shape[-1], -1)).to(self.scale.dtype)
        if self.grid.bits == 1:
            groups = groups.mul_(2).add_(1)
        if self.zero_point is not None:
            groups -= self.zero_point.unsqueeze(-1).to(groups.dtype)
        groups *= self.scale.unsqueeze(-1)
        return groups.flatten(-2).to(dtype)

    def split(self, heights: Sequence[int]) -> list[Quantized]:
        """The matrices of so many rows that lie one below the other in this one."""
        zeros = [None] * len(heights) if self.zero_point is None else self.zero_point.split(heights, dim=-2)
        parts = zip(self.codes.split(heights, dim=-2), self.scale.split(heights, dim=-2), zeros, strict=True)
        return [Quantized(self.grid, *part) for part in parts]


def check_group_size(grid: Grid, width: int, what: str) -> None:
    """Raises `UsageError` when the groups do not fill rows of `width` input channels; `what` names the tensor."""
    if grid.group_size is None or width % grid.group_size == 0:
        return
    sizes = [size for size in range(8, width + 1) if width % size == 0]
    choices = ", ".join(map(str, sizes)) or str(width)
    raise UsageError(
        f"{what} has {width} input channels, which group_size {grid.group_size} does not divide; choose one of "
        f"{choices}, or `channel`."
    )


def check_finite(weight: Tensor, what: str) -> None:
    """Raises `CheckpointError` when a weight is NaN or infinite; `what` names the tensor."""
    # NaN is the least and the greatest of whatever it is among.
    if weight.numel() and not torch.isfinite(torch.stack(weight.aminmax())).all():
        count = int((~torch.isfinite(weight)).sum())
        raise CheckpointError(
            f"{what} holds {count} values that are NaN or infinite; repair or replace the checkpoint."
        )


def fit(
    weight: Tensor,
    grid: Grid,
    *,
    scale_dtype: torch.dtype,
    search_steps: int = 0,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale [..., O, G] in `scale_dtype` and zero point (int8, None if symmetric) of weight float [..., O, I].

    `search_steps` = 0 takes each group's full range; n > 0 also tries n ranges shrunk evenly down to 0.3 of it and
    keeps the one of least squared error. From n = 10 on the search goes from coarse to fine, and so finer than n ranges
    without trying all: summed over groups, its error is that of trying all or less (at 2 bits up to 0.2 % more).
    `importance` [..., I] weighs the input channels in that error (and in the mean of 1 bit, which has no range to
    search). Needs little memory beyond its result.
    """
    *_, height, width = weight.shape
    num_groups = grid.num_groups(width)
    groups = weight.reshape(-1, height, num_groups, width // num_groups)
    scale = torch.empty(groups.shape[:3], dtype=scale_dtype, device=weight.device)
    zero = None if grid.symmetric else torch.empty(groups.shape[:3], dtype=torch.int8, device=weight.device)
    shares = None if importance is None else importance.reshape(-1, 1, num_groups, width // num_groups).float()
    limit = CPU_CHUNK if weight.device.type == "cpu" else DEVICE_CHUNK
    num_rows = max(1, limit // width)
    for matrices in _slices(len(groups), max(1, num_rows // height)):
        for rows in _slices(height, num_rows):
            part = groups[matrices, rows].float().contiguous()
            found = _fit_groups(part, grid, scale_dtype, search_steps, None if shares is None else shares[matrices])
            scale[matrices, rows] = found[0].squeeze(-1)
            if zero is not None:
                zero[matrices, rows] = found[1].squeeze(-1)
    shape = (*weight.shape[:-1], num_groups)
    return scale.reshape(shape), None if zero is None else zero.reshape(shape)


def encode(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Codes int8 [..., O, I] of weight [..., O, I] on the grid that `fit` chose: the nearest, ties to even."""
    num_groups = scale.shape[-1]
    rows = weight.reshape(-1, num_groups, weight.shape[-1] // num_groups)
    scales = scale.reshape(-1, num_groups, 1).float()
    zeros = None if zero_point is None else zero_point.reshape(-1, num_groups, 1).float()
    codes = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    for part in row_chunks(rows):
        codes[part] = round_to_codes(rows[part].float(), scales[part], None if zeros is None else zeros[part], grid)
    return codes.reshape(weight.shape)


def round_to_codes(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Codes as float32, all arguments float32 and broadcast against each other."""
    if grid.bits == 1:
        return weight.lt(0).to(torch.float32).neg_()
    scaled = weight / scale
    if zero_point is not None:
        scaled += zero_point
    return scaled.clamp_(grid.lowest, grid.highest).round_()


def code_values(codes: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Float32 values of float32 codes, rounded to `dtype`, the stored dtype of the scales."""
    if grid.bits == 1:
        codes = codes * 2 + 1
    if zero_point is not None:
        codes = codes - zero_point
    values = codes * scale
    return values if dtype == torch.float32 else values.to(dtype).float()


def row_chunks(rows: Tensor) -> Iterator[slice]:
    """Slices of the first dimension that hold a bounded number of weights."""
    limit = CPU_CHUNK if rows.device.type == "cpu" else DEVICE_CHUNK
    return _slices(rows.shape[0], max(1, limit // rows.shape[1:].numel()))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _fit_groups(
    groups: Tensor, grid: Grid, scale_dtype: torch.dtype, search_steps: int, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [E, O, G, 1] of groups float32 [E, O, G, g]; float32 holding what the stored dtype can.

    `importance` is [E, 1, G, g].
    """
    if grid.bits == 1:
        magnitude = groups.abs()
        if importance is None:
            mean = magnitude.mean(-1, keepdim=True)
        else:
            total = importance.sum(-1, keepdim=True)
            mean = (magnitude * importance).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
        return mean.to(scale_dtype).float(), torch.zeros_like(mean)
    low = groups.amin(-1, keepdim=True).clamp_(max=0)
    high = groups.amax(-1, keepdim=True).clamp_(min=0)
    best = _scale_of_range(low, high, grid, scale_dtype)
    if search_steps == 0:
        return best
    buffers = torch.empty_like(groups), torch.empty_like(groups)
    best_error = _squared_error(groups, *best, grid, importance, buffers)
    best_step = torch.zeros_like(low)

    def look_at(step: Tensor) -> None:
        nonlocal best, best_error, best_step
        share = 1 - (1 - NARROWEST_RANGE) / search_steps * step.clamp(0, search_steps)
        tried = _scale_of_range(low * share, high * share, grid, scale_dtype)
        error = _squared_error(groups, *tried, grid, importance, buffers)
        better = error < best_error
        best = torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1])
        best_error, best_step = torch.where(better, error, best_error), torch.where(better, step, best_step)

    stride: float = 1 << max(0, (search_steps // COARSE_STEPS).bit_length() - 1)
    finest = 1 if stride == 1 else 0.5
    for step in range(int(stride), search_steps + 1, int(stride)):
        look_at(torch.full_like(low, step))
    while stride > finest:
        stride /= 2
        middle = best_step
        look_at(middle - stride)
        look_at(middle + stride)
    return best


def _scale_of_range(low: Tensor, high: Tensor, grid: Grid, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale, rounded to `scale_dtype`, and whole zero point that cover `low` <= 0 to `high` >= 0; all float32."""
    steps = (1 << grid.bits) - 1
    scale = torch.maximum(-low, high) * 2 / steps if grid.symmetric else (high - low) / steps
    scale = scale.to(scale_dtype).float()
    # A group of zeros would divide by zero; compressed-tensors stores the same number for it.
    scale = torch.where(scale == 0, torch.finfo(scale_dtype).eps, scale)
    if grid.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (grid.lowest - low / scale).clamp_(grid.lowest, grid.highest).round_()


def _squared_error(
    groups: Tensor,
    scale: Tensor,
    zero: Tensor,
    grid: Grid,
    importance: Tensor | None,
    buffers: tuple[Tensor, Tensor],
) -> Tensor:
    """Error [E, O, G, 1] of rounding groups [E, O, G, g] to a grid of 2 bits or more; overwrites the buffers."""
    scaled = torch.div(groups, scale, out=buffers[0])
    if not grid.symmetric:
        scaled.add_(zero)
    error = torch.round(scaled, out=buffers[1]).clamp_(grid.lowest, grid.highest).sub_(scaled)
    error.mul_(error)  # in steps of the scale
    if importance is None:
        total = error.sum(-1, keepdim=True)
    elif groups.shape[2] == 1:  # one group of every row, for all rows of a matrix the same importance
        total = (error.squeeze(2) @ importance[:, 0].transpose(1, 2)).unsqueeze(2)
    else:
        total = error.mul_(importance).sum(-1, keepdim=True)
    return total.mul_(scale).mul_(scale)
