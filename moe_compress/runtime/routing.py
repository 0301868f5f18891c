"""Layers whose tokens use fewer experts than their family's: zero experts, fewer slots, slots skipped by gate ratio.

The family's own router runs unchanged, with more rows or another top-k, so that scores, groups, normalisation and
scaling stay its business. What it picked is then looked at before the experts are called: a slot that is not to run
gets the index `num_experts` and the gate value 0, and no gate value of the others changes. Whatever runs the experts
(`skipping.py`, packed or tied experts) has to leave such slots out.

Not covered: how a router gets its rows for zero experts (`zero_experts.py`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.models.families import TOP_K_KEYS
from moe_compress.models.layers import decoder_layers, experts_of, routing_groups
from moe_compress.models.routing import SECTION, USE_ZERO_EXPERTS, Routing, layer_routings
from moe_compress.runtime.protection import Protection
from moe_compress.runtime.skipping import SkippingExperts
from moe_compress.runtime.zero_experts import use_zero_experts


class RoutingRules:
    """Called before a layer's experts: the slots that are not to run are taken out of the routing."""

    def __init__(self, routing: Routing, num_experts: int, num_groups: int) -> None:
        self.routing, self.num_experts, self.num_groups = routing, num_experts, num_groups
        self.zero_experts = bool(routing.zero_experts)  # off while the original model is wanted
        self.protected_T: Tensor | None = None  # tokens that skip nothing in the next call

    @property
    def skips(self) -> bool:
        """Whether slots may be taken out."""
        routing = self.routing
        return self.zero_experts or routing.skip is not None or routing.top_k != routing.normalise_over

    def __call__(self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """As a forward pre-hook of the experts module."""
        hidden_TH, index_TK, gate_TK = (*args, *kwargs.values())
        return (hidden_TH, *self.apply(index_TK, gate_TK)), {}

    def apply(self, index_TK: Tensor, gate_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The routing with skipped slots marked: index `num_experts`, gate value 0."""
        if not self.skips:
            return index_TK, gate_TK
        index_TK = self.experts_of(index_TK)
        runs_TK = (index_TK < self.num_experts) & (gate_TK != 0)
        kept = self.routing.top_k
        if kept is not None and kept < index_TK.shape[1]:
            ranked_TK = gate_TK.argsort(dim=1, descending=True, stable=True)
            runs_TK = runs_TK.scatter(1, ranked_TK[:, kept:], False)
        if self.routing.skip is not None:
            runs_TK, gate_TK = self._skip(runs_TK, gate_TK)
        return index_TK.masked_fill(~runs_TK, self.num_experts), gate_TK.masked_fill(~runs_TK, 0)

    def experts_of(self, row_TK: Tensor) -> Tensor:
        """The routed experts that rows of the router stand for; `num_experts` or more for a row of no expert."""
        if not self.zero_experts or self.num_groups == 1:
            return row_TK
        own = self.num_experts // self.num_groups
        length = own + self.routing.zero_experts // self.num_groups
        group_TK, position_TK = row_TK // length, row_TK % length
        expert_TK = group_TK * own + position_TK
        return expert_TK.masked_fill((position_TK >= own) | (group_TK >= self.num_groups), self.num_experts)

    def _skip(self, runs_TK: Tensor, gate_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The rule of dynamic skipping: a slot runs unless its gate value is too small beside the token's largest."""
        skip = self.routing.skip
        assert skip is not None
        before_TK = gate_TK.masked_fill(~runs_TK, 0)
        keeps_TK = before_TK >= skip.threshold * before_TK.amax(dim=1, keepdim=True)
        if self.protected_T is not None:
            keeps_TK = keeps_TK | self.protected_T[:, None]
        keeps_TK = keeps_TK & runs_TK
        if skip.renormalise:
            kept_T1 = before_TK.masked_fill(~keeps_TK, 0).sum(dim=1, keepdim=True)
            total_T1 = before_TK.sum(dim=1, keepdim=True)
            gate_TK = torch.where(kept_T1 > 0, gate_TK * total_T1 / kept_T1, gate_TK)
        return keeps_TK, gate_TK


def set_routing(model: PreTrainedModel, zero_experts: bool | None = None) -> None:
    """Make the layers of a model that was just built route as the section of its configuration says.

    `zero_experts` goes before the section's own `use_zero_experts`.
    """
    _, layers = decoder_layers(model)
    for index, routing in layer_routings(model.config).items():
        if not routing.departs:
            continue
        path, experts = experts_of(layers[index])
        block = layers[index].get_submodule(path.rpartition(".")[0])
        if routing.normalise_over is not None:
            set_top_k(block, experts, routing.normalise_over)
        rules = RoutingRules(routing, len(experts.down_proj), routing_groups(model.config))
        if routing.skip is not None and routing.skip.protect:
            Protection(routing.skip.protect, rules, index).attach(layers[index], block, experts)
            model.set_attn_implementation("eager")
        experts.register_forward_pre_hook(rules, with_kwargs=True)
        experts.routing_rules = rules
        base = type(experts)
        experts.__class__ = type(f"Skipping{base.__name__}", (SkippingExperts, base), {"__module__": __name__})
    if zero_experts is None:
        zero_experts = getattr(model.config, SECTION).get(USE_ZERO_EXPERTS, True)
    if not zero_experts:
        use_zero_experts(model, False)


def set_top_k(block: nn.Module, experts: nn.Module, count: int) -> None:
    """Let the router of a block pick `count` experts, wherever it keeps that number."""
    modules: list[Any] = [module for module in block.modules() if module is not experts]
    owners = [module for module in modules if isinstance(vars(module).get("top_k"), int)]
    for module in owners:
        module.top_k = count
    if owners:
        return
    for module in modules:  # it asks the configuration, as attention does for its own settings
        config = getattr(module, "config", None)
        keys = [key for key in TOP_K_KEYS if isinstance(getattr(config, key, None), int)]
        if keys and module is not block and not hasattr(module, "layer_idx"):
            module.config = copy.copy(config)
            for key in keys:
                setattr(module.config, key, count)
