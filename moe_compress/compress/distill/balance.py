"""Routers that learn to use their zero experts: the group balance loss of a model's layers, and what they skip.

Of each layer with zero experts the loss of `zero_experts.losses` is added up, over the tokens of one forward pass; the
weight in it follows from the share of slots that is to be skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compress.compress.zero_experts.losses import group_balance_loss
from moe_compress.compress.zero_experts.plan import balance_weight
from moe_compress.errors import UsageError
from moe_compress.models.layers import MoELayer
from moe_compress.runtime.trace import RouterPass, RoutingTrace


class SkipTarget:
    """The share of slots that the zero experts of these layers are to take.

    Raises `UsageError` when a layer has none.
    """

    def __init__(self, layers: Sequence[MoELayer], target_skip: float) -> None:
        self.layers, self.target_skip = layers, target_skip
        without = [moe.layer for moe in layers if not moe.routing.zero_experts]
        if without:
            raise UsageError(
                f"`target_skip` is for routers with zero experts, and layer {without[0]} has none; put "
                "`op: zero_experts` before this step."
            )

    def loss(self, trace: RoutingTrace) -> Tensor:
        """Sum over layers of the group balance loss with alpha 1: their number where the target is met."""
        return torch.stack([self.layer_loss(trace.last(moe.layer)) for moe in self.layers]).sum()

    def layer_loss(self, found: RouterPass) -> Tensor:
        """Of one layer; 1 where the target is met."""
        moe = found.moe
        weight = balance_weight(self.target_skip, moe.num_experts, moe.routing.zero_experts)
        return group_balance_loss(found.probability_TR, found.zero_R, found.skipped_TK, weight, alpha=1.0)


def skipped_L(trace: RoutingTrace) -> Tensor:
    """The share of slots that each traced layer skipped in its last pass."""
    return torch.stack([passes[-1].skipped_TK.double().mean() for passes in trace.passes.values()])
