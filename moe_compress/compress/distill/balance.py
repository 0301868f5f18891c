"""Routers that learn to use their zero experts: the balance losses of a model's layers, and what they skip.

Of each layer with zero experts the losses of `zero_experts.losses` are added up, over the tokens of one forward pass;
the weight in them follows from the share of slots that is to be skipped. The balance of single experts is that of a
whole update: its slots are counted on all processes before the first pass that is learnt from, so that it makes no
difference to the gradient into how many passes and processes the batch is divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from moe_compress.compress.zero_experts.losses import expert_balance_loss, group_balance_loss
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
        weight = self._weight(found)
        return group_balance_loss(found.probability_TR, found.zero_R, found.skipped_TK, weight, alpha=1.0)

    def expert_loss(self, trace: RoutingTrace, shares: Mapping[int, Tensor]) -> Tensor:
        """Sum over layers of the balance of single experts in a part of the batch that `shares` were counted in."""
        passes = [(shares[moe.layer], trace.last(moe.layer)) for moe in self.layers]
        losses = [
            expert_balance_loss(found.probability_TR, share_R, found.zero_R, self._weight(found))
            for share_R, found in passes
        ]
        return torch.stack(losses).sum()

    def shares(
        self, picked: Iterable[Mapping[int, Tensor]], over_processes: Callable[[Tensor], Tensor]
    ) -> dict[int, Tensor]:
        """By layer, the share [R] of all slots that each row of its router took (float64).

        `picked` are the rows that tokens were sent to, by layer, in the parts of the batch that are this process's;
        `over_processes` adds up a tensor.
        """
        sizes = [num_rows(moe) for moe in self.layers]
        counts = torch.zeros(sum(sizes), dtype=torch.float64, device=next(self.layers[0].experts.parameters()).device)
        for rows in picked:
            pairs = zip(self.layers, sizes, strict=True)
            counts += torch.cat([torch.bincount(rows[moe.layer].flatten(), minlength=size) for moe, size in pairs])
        found = over_processes(counts).split(sizes)
        return {moe.layer: count_R / count_R.sum() for moe, count_R in zip(self.layers, found, strict=True)}

    def _weight(self, found: RouterPass) -> float:
        """A family's own null experts take slots like zero experts, so they count as such."""
        num_zero = int(found.zero_R.sum())
        return balance_weight(self.target_skip, len(found.zero_R) - num_zero, num_zero)


def num_rows(moe: MoELayer) -> int:
    """Rows of a layer's router: routed experts, zero experts, and null experts that the family has itself."""
    return max(tensor.shape[dimension] for tensor, dimension in moe.router_tensors().values())


def skipped_L(trace: RoutingTrace) -> Tensor:
    """The share of slots that each traced layer skipped in its last pass."""
    return torch.stack([passes[-1].skipped_TK.double().mean() for passes in trace.passes.values()])
