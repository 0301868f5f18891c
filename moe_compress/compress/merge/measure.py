"""Every expert's mean output over the same tokens, whichever they were routed to (HC-SMoE, arXiv 2410.08589)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_compress.compress.sampling import EvenSample
from moe_compress.models.experts import whole_expert
from moe_compress.models.layers import MoELayer

SAMPLED_TOKENS = 1024


class MeanOutputs:
    """A `Measurement` that keeps a sample of the layer's tokens and runs every expert on it.

    Every token comes to the same number of experts, so an even sample of (token, expert) pairs is one of the tokens.
    """

    def __init__(self, moe: MoELayer, limit: int = SAMPLED_TOKENS) -> None:
        self.moe, self._sample = moe, EvenSample(limit)

    def add(self, expert: int, input_NH: Tensor, block_input_NH: Tensor, gate_N: Tensor, leaving_N: Tensor) -> None:
        self._sample.add(input_NH)

    @torch.no_grad()
    def measure(self) -> dict[str, NDArray[np.float64]]:
        """`mean_output` float64 [E, H]."""
        (sample_NH,) = self._sample.kept
        means = [
            whole_expert(self.moe.experts, expert, sample_NH).mean(0, dtype=torch.float64)
            for expert in range(self.moe.num_experts)
        ]
        return {"mean_output": torch.stack(means).cpu().numpy()}
