"""Matrix products on CPUs by oneDNN, which has AVX-512 code for every processor that can run it.

The BLAS library that torch is built with has such code for Intel's processors alone: on AMD's (Zen 5) oneDNN took 0.45
of its time. Sums are added up in another order, so results differ in the last bits.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Multiplications below which handing the tensors over costs more than it gains.
LEAST_WORK = 1 << 23
# Rows are taken in blocks of this many, the last one filled up to a multiple of ROWS, or a power of 2 below: oneDNN
# compiles a program for every size it meets, and keeps half a megabyte for each.
BLOCK = 1024
ROWS = 128
# The operation of torch on plain tensors, which no promise covers; without it the BLAS library multiplies.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Inputs [..., I] to [..., O], as `torch.nn.functional.linear`."""
    if (
        inputs.numel() * len(weight_OI) < LEAST_WORK
        or inputs.device.type != "cpu"
        or not inputs.dtype == weight_OI.dtype == torch.float32
        or torch.is_grad_enabled()
        or not HAS_ONEDNN
    ):
        return F.linear(inputs, weight_OI, bias_O)
    rows_NI = inputs.reshape(-1, inputs.shape[-1])
    blocks = rows_NI.split(_block_sizes(len(rows_NI)))
    if len(blocks) == 1:
        output_NO = _block(blocks[0], weight_OI, bias_O)
    else:
        output_NO = inputs.new_empty(len(rows_NI), len(weight_OI))
        for block_NI, part_NO in zip(blocks, output_NO.split([len(block) for block in blocks]), strict=True):
            part_NO.copy_(_block(block_NI, weight_OI, bias_O))
    return output_NO.view(*inputs.shape[:-1], -1)


def _block_sizes(rows: int) -> list[int]:
    """Of so many rows: whole blocks, what is left in a multiple of ROWS, and the rest."""
    sizes = [BLOCK] * (rows // BLOCK) + [rows % BLOCK // ROWS * ROWS, rows % ROWS]
    return [size for size in sizes if size]


def _block(rows_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    missing = -len(rows_NI) % min(ROWS, 1 << (len(rows_NI) - 1).bit_length())
    filled_NI = F.pad(rows_NI, (0, 0, 0, missing)) if missing else rows_NI
    output_NO: Tensor = torch.ops.mkldnn._linear_pointwise(filled_NI, weight_OI, bias_O, "none", [], "")
    return output_NO[: len(rows_NI)]


def speed_up(model: nn.Module) -> None:
    """Let the model's linear layers use `linear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, inputs: Tensor) -> Tensor:
    return linear(inputs, module.weight, module.bias)
