"""Dropping experts from a checkpoint: the kept experts' weights and router rows, nothing else changes.

Weights are kept bit for bit and the router is not rescaled: a token that would have used a dropped expert takes the
next best of the kept ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.checkpoint.config_file import with_setting
from moe_compress.checkpoint.rewrite import Change
from moe_compress.compress.prune.plan import LayerPlan, PrunePlan
from moe_compress.models.families import EXPERT_COUNT_KEYS
from moe_compress.models.layers import SECTION, MoELayer
from moe_compress.runtime.banks import Bank
from moe_compress.runtime.families import with_banks, with_layers


class PruneChange(Change):
    """Applies a plan; a checkpoint whose layers keep different numbers of experts is one of the tier `plugin`.

    `scores` are needed where dropped experts become their mean outputs.
    """

    def __init__(self, plan: PrunePlan, scores: Scores | None = None) -> None:
        self.plan = plan
        self.layers = {layer.layer: layer for layer in plan.layers}
        self.means: dict[int, Tensor] = {}
        if plan.config.replace is not None:
            assert scores is not None
            self.means = {found.layer: mean_outputs(found) for found in scores.layers}

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        before = self.plan.layers[0].num_experts
        if self.plan.config.replace is not None:
            return with_banks(config, before, {index: bank_of(layer) for index, layer in self.layers.items()})
        return with_counts(config, before, {index: len(layer.keep) for index, layer in self.layers.items()})

    def layer(self, moe: MoELayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's tensors with only the kept experts, and perhaps the means of the others."""
        plan = self.layers[moe.layer]
        keep = torch.tensor(plan.keep)
        if self.plan.config.replace is None:
            return moe.select(state, keep)
        selected = moe.select_stored(state, keep)
        constants = bank_of(plan).constants
        if constants:
            like = state[f"{moe.experts_path}.down_proj"]
            selected[f"{moe.experts_path}.constants"] = self.means[moe.layer][constants].to(like)
        return selected


def mean_outputs(scores: LayerScores) -> Tensor:
    """Each expert's mean raw output over the tokens routed to it, float64 [E, H]; 0 without tokens."""
    tokens = np.maximum(scores.statistics["tokens"], 1.0)
    return torch.from_numpy(scores.statistics["output_sum"] / tokens[:, None])


def bank_of(plan: LayerPlan) -> Bank:
    """What the runtime is told of a layer whose dropped experts are constants."""
    slots = {expert: slot for slot, expert in enumerate(plan.keep)}
    return Bank(len(plan.keep), tuple(slots.get(expert) for expert in range(plan.num_experts)))


def with_counts(config: dict[str, Any], before: int, counts: Mapping[int, int]) -> dict[str, Any]:
    """`config.json` with these experts per layer instead of `before`: in the family's own keys, or layer by layer."""
    if SECTION in config or len(set(counts.values())) > 1:
        return with_layers(config, before, {layer: {"num_experts": count} for layer, count in counts.items()})
    return with_setting(config, EXPERT_COUNT_KEYS, before, next(iter(counts.values())))
