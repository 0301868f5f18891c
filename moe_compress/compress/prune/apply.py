"""Dropping experts from a checkpoint: the kept experts' weights and router rows, nothing else changes.

Weights are kept bit for bit and the router is not rescaled: a token that would have used a dropped expert takes the
next best of the kept ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_compress.checkpoint.config_file import with_setting
from moe_compress.checkpoint.rewrite import Change
from moe_compress.compress.prune.plan import PrunePlan
from moe_compress.models.families import EXPERT_COUNT_KEYS
from moe_compress.models.layers import SECTION, MoELayer
from moe_compress.runtime.families import with_layers


class PruneChange(Change):
    """Applies a plan; a checkpoint whose layers keep different numbers of experts is one of the tier `plugin`."""

    def __init__(self, plan: PrunePlan) -> None:
        self.keep = {layer.layer: torch.tensor(layer.keep) for layer in plan.layers}
        self.before = plan.layers[0].num_experts

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        return with_counts(config, self.before, {layer: len(keep) for layer, keep in self.keep.items()})

    def layer(self, moe: MoELayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's tensors with only the kept experts."""
        return moe.select(state, self.keep[moe.layer])


def with_counts(config: dict[str, Any], before: int, counts: Mapping[int, int]) -> dict[str, Any]:
    """`config.json` with these experts per layer instead of `before`: in the family's own keys, or layer by layer."""
    if SECTION in config or len(set(counts.values())) > 1:
        return with_layers(config, before, {layer: {"num_experts": count} for layer, count in counts.items()})
    return with_setting(config, EXPERT_COUNT_KEYS, before, next(iter(counts.values())))
