"""Round to nearest: every weight to the closest value of its group's grid. Looks at no activations."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.runtime.grid import Grid, Quantized, check_finite, check_group_size, encode, fit


def rtn(
    weight: Tensor, grid: Grid, *, scale_dtype: torch.dtype, search_steps: int = 0, what: str = "the weight"
) -> Quantized:
    """Quantize weight float [..., O, I]; `search_steps` as in `fit`, `what` names the tensor in errors.

    Raises `UsageError` when the group size does not divide I and `CheckpointError` on NaN or infinity.
    """
    check_group_size(grid, weight.shape[-1], what)
    check_finite(weight, what)
    scale, zero_point = fit(weight, grid, scale_dtype=scale_dtype, search_steps=search_steps)
    return Quantized(grid, encode(weight, scale, zero_point, grid), scale, zero_point)
