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
# Rows are filled up to a multiple of this: oneDNN compiles, and keeps, a program for every size it meets.
ROWS = 64


def linear(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Inputs [..., I] to [..., O], as `torch.nn.functional.linear`."""
    if (
        inputs.numel() * len(weight_OI) < LEAST_WORK
        or inputs.device.type != "cpu"
        or not inputs.dtype == weight_OI.dtype == torch.float32
        or torch.is_grad_enabled()
        or not torch.backends.mkldnn.is_available()
    ):
        return F.linear(inputs, weight_OI, bias_O)
    rows_NI = inputs.reshape(-1, inputs.shape[-1])
    filled_NI = F.pad(rows_NI, (0, 0, 0, -len(rows_NI) % ROWS))
    output_NO = F.linear(filled_NI.to_mkldnn(), weight_OI, bias_O).to_dense()
    return output_NO[: len(rows_NI)].view(*inputs.shape[:-1], -1)


def speed_up(model: nn.Module) -> None:
    """Let the model's linear layers use `linear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, inputs: Tensor) -> Tensor:
    return linear(inputs, module.weight, module.bias)
