"""Merging a checkpoint's experts, layer by layer: their neurons matched, then averaged or kept as small differences.

Where activations are needed, the calibration tokens pass through the layers that are already merged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_compress.checkpoint.rewrite import PROBES, Change
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.merge import align
from moe_compress.compress.merge.average import average
from moe_compress.compress.merge.differences import Differ, empty_differences
from moe_compress.compress.merge.neurons import Expert, Original, inner_activations, read_expert, write_expert
from moe_compress.compress.merge.plan import Group, MergedLayer, MergePlan
from moe_compress.compress.prune.apply import with_counts
from moe_compress.models.layers import MoELayer
from moe_compress.models.lockstep import Enough, Lockstep
from moe_compress.runtime.banks import Bank
from moe_compress.runtime.families import with_banks

ALIGNED_TOKENS = 2048  # on which neurons are compared


class MergeChange(Change):
    """Applies a plan; `tokens` are needed for alignment by activations and for differences."""

    def __init__(self, plan: MergePlan, tokens: Tensor | None, batch_size: int) -> None:
        self.plan, self.settings = plan, plan.config
        self.layers: dict[int, MergedLayer] = {layer.layer: layer for layer in plan.layers}
        self.tokens, self.batch_size = tokens if needs_tokens(plan) else None, batch_size
        self._original: Any = None

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        before = self.plan.layers[0].num_experts
        if not self.settings.keeps_router:
            return with_counts(config, before, {layer: len(found.groups) for layer, found in self.layers.items()})
        return with_banks(config, before, {layer: bank_of(found) for layer, found in self.layers.items()})

    def layer(self, moe: MoELayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer with the dominant experts as they are; `store` merges the others into them."""
        plan = self.layers[moe.layer]
        path = moe.experts_path
        own = {name.removeprefix(f"{path}."): state[name] for name in state if name.startswith(f"{path}.")}
        self._original = Original(moe.experts, own)
        dominants = torch.tensor(plan.dominants)
        if not self.settings.keeps_router:
            return moe.select(state, dominants)
        state = moe.select_stored(state, dominants)
        if self.settings.keep_differences is not None:
            device = next(iter(own.values())).device
            state |= empty_differences(moe.experts, bank_of(plan), f"{path}.differences.", device)
        return state

    @torch.no_grad()
    def store(self, target: LayerStream, index: int, run: Lockstep) -> dict[str, Tensor]:
        plan = self.layers.get(index)
        if plan is not None and any(len(group.members) > 1 for group in plan.groups):
            experts, original = target.moe_layers[index].experts, self._original
            sample_NH = self._sample(experts, run, index) if self.settings.align == "activations" else None
            differ = Differ(experts) if self.settings.keep_differences is not None else None
            for slot, group in enumerate(plan.groups):
                aligned = self._aligned(group, original, sample_NH)
                if differ is None:
                    write_expert(experts, slot, average(aligned, group.weights))
                    continue
                lead = aligned[group.members.index(group.dominant)]
                for expert, member in zip(group.members, aligned, strict=True):
                    differ.add(expert, member, None if member is lead else lead)
            if differ is not None:
                differ.fit(run, index)
        self._original = None
        return target.stored_layer(index)

    def _aligned(self, group: Group, original: Any, sample_NH: Tensor | None) -> list[Expert]:
        """The members of a group, their neurons in the order of the dominant one's."""
        members = [read_expert(original, expert) for expert in group.members]
        if self.settings.align is False or len(members) == 1:
            return members
        reference = members[group.members.index(group.dominant)]
        if sample_NH is None:
            orders = [align.by_weights(reference.rows_FD, member.rows_FD) for member in members]
        else:
            seen = inner_activations(original, reference, sample_NH)
            orders = [align.by_activations(seen, inner_activations(original, one, sample_NH)) for one in members]
        return [
            member if member is reference else member.permuted(order)
            for member, order in zip(members, orders, strict=True)
        ]

    def _sample(self, experts: Any, run: Lockstep, index: int) -> Tensor:
        """Some of the tokens [N, H] that come to the layer's experts, evenly spaced."""
        assert self.tokens is not None
        step = max(1, self.tokens.numel() // ALIGNED_TOKENS)
        kept: list[Tensor] = []

        def enter(module: Any, inputs: Any) -> None:
            if run.batch >= PROBES:
                kept.append(inputs[0][::step].clone())
            raise Enough

        handle = experts.register_forward_pre_hook(enter)
        run.rehearse(index)
        handle.remove()
        return torch.cat(kept)


def needs_tokens(plan: MergePlan) -> bool:
    """Whether the calibration tokens have to pass through the merged layers."""
    return plan.config.align == "activations" or plan.config.keep_differences is not None


def bank_of(plan: MergedLayer) -> Bank:
    """What the runtime is told of a layer that keeps its router."""
    led = set(plan.dominants)
    ranks = {
        part: tuple(0 if expert in led else rank for expert in range(plan.num_experts))
        for part, rank in plan.ranks.items()
    }
    return Bank(len(plan.groups), plan.slots, ranks)
