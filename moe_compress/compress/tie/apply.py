"""Tying a checkpoint's layers: banks in place of the experts, and what each layer keeps beside its bank.

The calibration tokens pass through the layers that are already tied, where differences are fitted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compress.checkpoint.rewrite import Change
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.merge import align
from moe_compress.compress.merge.differences import Differ, empty_differences
from moe_compress.compress.merge.neurons import Original, read_expert
from moe_compress.compress.tie.bank import load_bank
from moe_compress.compress.tie.plan import TiedGroup, TiePlan
from moe_compress.models.layers import MoELayer
from moe_compress.models.lockstep import Lockstep
from moe_compress.runtime.banks import Bank, dense_experts
from moe_compress.runtime.families import with_banks


class TieChange(Change):
    """Applies a plan whose banks are in `banks`; `tokens` are needed for differences."""

    def __init__(self, plan: TiePlan, banks: Path, tokens: Tensor | None, batch_size: int) -> None:
        self.plan, self.banks = plan, banks
        self.tokens = tokens if any(group.ranks for group in plan.groups) else None
        self.batch_size = batch_size
        self._original: Any = None

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        num_experts = self.plan.groups[0].num_experts
        return with_banks(config, num_experts, banks_of(self.plan))

    def layer(self, moe: MoELayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer with the experts of its bank, and differences that say nothing yet."""
        group = self.plan.group_of.get(moe.layer)
        if group is None:
            return state
        path = moe.experts_path
        own = {name.removeprefix(f"{path}."): state[name] for name in state if name.startswith(f"{path}.")}
        self._original = Original(moe.experts, own)
        bank = {f"{path}.{name}": tensor for name, tensor in load_bank(self.banks, group.leader).items()}
        device = next(iter(own.values())).device
        state = state | {name: tensor.to(device) for name, tensor in bank.items()}
        if group.ranks:
            described = banks_of(self.plan)[moe.layer]
            state |= empty_differences(moe.experts, described, f"{path}.differences.", device)
        return state

    @torch.no_grad()
    def store(self, target: LayerStream, index: int, run: Lockstep) -> dict[str, Tensor]:
        group = self.plan.group_of.get(index)
        if group is not None and group.ranks:
            self._differ(group, target, index, run)
        self._original = None
        return target.stored_layer(index)

    def _differ(self, group: TiedGroup, target: LayerStream, index: int, run: Lockstep) -> None:
        """Fit what this layer's experts keep beside those of the bank."""
        experts = target.moe_layers[index].experts
        differ = Differ(experts)
        (tied,) = (one for one in group.layers if one.layer == index)
        for expert, slot in enumerate(tied.slots):
            lead, member = read_expert(experts, slot), read_expert(self._original, expert)
            order = align.by_weights(lead.rows_FD, member.rows_FD)
            differ.add(expert, member.permuted(order), lead)
        differ.fit(run, index)


class ExpandChange(Change):
    """Writes the dense experts that a tied checkpoint stands for into its source's own form."""

    def __init__(self, tied: LayerStream) -> None:
        self.tied = tied

    def layer(self, moe: MoELayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        experts: Any = self.tied.moe_layers[moe.layer].experts
        self.tied.load(moe.layer)
        found = dense_experts(experts) if hasattr(experts, "bank") else dict(experts.named_parameters(recurse=False))
        dense = {f"{moe.experts_path}.{name}": tensor for name, tensor in found.items()}
        self.tied.release(moe.layer)
        return state | {name: tensor.to(state[name]) for name, tensor in dense.items()}


def banks_of(plan: TiePlan) -> dict[int, Bank]:
    """What the runtime is told of each layer that shares a bank, or differs from it."""
    found = {}
    for group in plan.groups:
        ranks = {part: (rank,) * group.num_experts for part, rank in group.ranks.items()}
        for tied in group.layers:
            leads = tied.layer == group.leader
            if not leads or ranks:
                found[tied.layer] = Bank(group.num_experts, tied.slots, ranks, None if leads else group.leader)
    return found
