"""Every expert's mean output over the same tokens, whichever they were routed to (HC-SMoE, arXiv 2410.08589)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_compress.models.experts import expert_output
from moe_compress.models.layers import MoELayer

SAMPLED_TOKENS = 1024


class MeanOutputs:
    """A `Measurement` that keeps a sample of the layer's tokens and runs every expert on it.

    Every token comes to the same number of experts, so evenly spaced ones of all (token, expert) pairs are a sample of
    the tokens. Of a sample that has grown too large every other one is dropped, and only half as many taken from then.
    """

    def __init__(self, moe: MoELayer, limit: int = SAMPLED_TOKENS) -> None:
        self.moe, self.limit = moe, limit
        self._kept: list[Tensor] = []  # [1, H] each
        self._step, self._passed = 1, 0

    def add(self, expert: int, input_NH: Tensor, block_input_NH: Tensor, gate_N: Tensor) -> None:
        first = -self._passed % self._step
        self._kept += list(input_NH[first :: self._step].split(1))
        self._passed += len(input_NH)
        while len(self._kept) > self.limit:
            del self._kept[1::2]
            self._step *= 2

    @torch.no_grad()
    def measure(self) -> dict[str, NDArray[np.float64]]:
        """`mean_output` float64 [E, H]."""
        sample_NH = torch.cat(self._kept)
        means = [
            expert_output(self.moe.experts, expert, sample_NH).mean(0, dtype=torch.float64)
            for expert in range(self.moe.num_experts)
        ]
        return {"mean_output": torch.stack(means).cpu().numpy()}
