"""Dropping experts from a checkpoint: the kept experts' weights and router rows, nothing else changes.

Weights are kept bit for bit and the router is not rescaled: a token that would have used a dropped expert takes the
next best of the kept ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_compress.compress.prune.plan import PrunePlan
from moe_compress.models.families import EXPERT_COUNT_KEYS, OTHER_TOWERS
from moe_compress.models.layers import MoELayer


class PruneChange:
    """Applies a plan whose layers all keep the same number of experts."""

    def __init__(self, plan: PrunePlan) -> None:
        self.keep = {layer.layer: torch.tensor(layer.keep) for layer in plan.layers}
        self.before = plan.layers[0].num_experts
        self.after = len(plan.layers[0].keep)
        assert all(len(keep) == self.after for keep in self.keep.values()), "counts that differ need the plugin tier"

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """`config.json` with the language model's new expert count under every name it has, at any depth."""
        return {
            key: self.after
            if key in EXPERT_COUNT_KEYS and value == self.before
            else self.config(value)
            if isinstance(value, dict) and key not in OTHER_TOWERS
            else value
            for key, value in config.items()
        }

    def layer(self, moe: MoELayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's tensors with only the kept experts."""
        return moe.select(state, self.keep[moe.layer])
