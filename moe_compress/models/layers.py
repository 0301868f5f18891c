"""What an MoE layer is, in every architecture: found by structure, not by a list of names.

`transformers` marks every fused experts module with `use_experts_implementation`, which leaves the flags
`is_transposed`, `has_bias` and `has_gate` on it. What else belongs to the experts (router rows, correction biases,
per-expert scales) the architecture itself tells: a second empty model is built with twice the experts, and the tensors
that grew are those that count experts. What structure does not tell is in `families.py`.

Refused: experts that are no fused module, several sets of experts in one layer, routers that look experts up by number,
and tensors outside the MoE blocks that count experts. Not covered: routers that share one tensor between layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.errors import UnsupportedModelError
from moe_compress.models.families import DIVIDED_GATES, EXPERT_COUNT_KEYS, FIXED_TOP_K, TOP_K_KEYS, UNDIVIDED_GATES
from moe_compress.models.routing import FAMILY_ROUTING, Routing, layer_routings, router_rows
from moe_compress.models.routing import SECTION as SECTION
from moe_compress.models.skeleton import SUPPORTED, build_skeleton

PACKED = "packed"  # in the section: which weights are packed, and how
BANK = "bank"  # in that section, of a layer: how its router's experts are stored when they are not one each


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model: where its experts and its router live.

    `counted` names, inside the decoder layer, every tensor with an entry per expert, and the dimension they lie in.
    That dimension may be longer than `num_experts`: what follows the routed experts belongs to shared or null experts.
    """

    layer: int  # index among the decoder layers
    block_name: str  # the module that owns experts and router, in the model
    block_path: str  # the same inside its decoder layer; empty where the decoder layer itself owns them
    experts_name: str
    block: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int  # that the router picks
    counted: Mapping[str, int]
    routing: Routing = FAMILY_ROUTING
    num_groups: int = 1

    @property
    def width(self) -> int:
        """Size of an expert's input and output: the hidden size, or less where experts work in a latent space."""
        experts: Any = self.experts
        return int(experts.down_proj.shape[2 if experts.is_transposed else 1])

    @property
    def output_scale(self) -> float:
        """What the block multiplies the experts' gated sum with, where this is not in the gate values already."""
        return float(getattr(self.block, "routed_scaling_factor", 1.0))

    @property
    def experts_path(self) -> str:
        """The experts module inside its decoder layer."""
        return f"{self.block_path}.{self.experts_name.removeprefix(self.block_name).lstrip('.')}".lstrip(".")

    @property
    def experts_per_token(self) -> float:
        """Routed experts that a token uses on average: measured where the configuration has it, else derived."""
        return self.routing.expected(self.num_experts, self.top_k)

    def expert_tensors(self) -> dict[str, Tensor]:
        """The experts' tensors by name relative to the block, each [E, ...]."""
        return {name: tensor for name, (tensor, _) in self._tensors().items() if self._of_experts(name)}

    def bank_tensors(self) -> dict[str, Tensor]:
        """What a bank adds to the experts' own tensors (differences, constants), by name relative to the block."""
        own, prefix = self.expert_tensors(), self.experts_name.removeprefix(self.block_name).lstrip(".")
        named = ((f"{prefix}.{name}".lstrip("."), tensor) for name, tensor in self.experts.named_parameters())
        return {name: tensor for name, tensor in named if name not in own and hasattr(self.experts, "bank")}

    def router_tensors(self) -> dict[str, tuple[Tensor, int]]:
        """The router's tensors by name relative to the block, each with the dimension that counts the experts."""
        return {name: found for name, found in self._tensors().items() if not self._of_experts(name)}

    def select(self, state: Mapping[str, Tensor], experts: Tensor) -> dict[str, Tensor]:
        """The decoder layer's tensors with only these experts (int64 [n], in their new order), as a new dictionary."""
        return self._selected(state, experts, self.counted)

    def select_stored(self, state: Mapping[str, Tensor], experts: Tensor) -> dict[str, Tensor]:
        """The decoder layer's tensors with only these experts, but all that the router has."""
        return self._selected(state, experts, {name: self.counted[name] for name in self._own_names()})

    def _own_names(self) -> list[str]:
        """The counted tensors that belong to the experts, by name inside the decoder layer."""
        own = {f"{self.block_path}.{name}".lstrip(".") for name in self.expert_tensors()}
        return [name for name in self.counted if name in own]

    def _selected(self, state: Mapping[str, Tensor], experts: Tensor, counted: Mapping[str, int]) -> dict[str, Tensor]:
        own, selected = self._own_names(), {}
        for name, dimension in counted.items():
            entries = experts if name in own else self.rows(experts, state[name].shape[dimension])
            selected[name] = state[name].index_select(dimension, entries.to(state[name].device))
        return {**state, **selected}

    def rows(self, experts: Tensor, length: int) -> Tensor:
        """The entries (int64) that a router tensor with `length` of them has with only these experts.

        Zero experts stay, behind the experts of their group; so does what follows them all.
        """
        if not self.routing.zero_experts:
            return torch.cat([experts, torch.arange(self.num_experts, length)])
        own, zeros = router_rows(self.num_experts, self.routing.zero_experts, self.num_groups)
        groups = torch.cat(
            [
                torch.tensor(own)[experts].view(self.num_groups, -1),
                torch.tensor(zeros, dtype=torch.int64).view(self.num_groups, -1),
            ],
            dim=1,
        )
        return torch.cat([groups.flatten(), torch.arange(len(own) + len(zeros), length)])

    def _tensors(self) -> dict[str, tuple[Tensor, int]]:
        tensors = self.block.state_dict(keep_vars=True)
        counted = {name[len(self.block_path) :].lstrip("."): dimension for name, dimension in self.counted.items()}
        return {name: (tensors[name], dimension) for name, dimension in counted.items()}

    def _of_experts(self, name: str) -> bool:
        return f"{self.block_name}.{name}".startswith(f"{self.experts_name}.")


def is_experts_module(module: nn.Module) -> bool:
    """Whether this is a fused experts module."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "down_proj")


def experts_of(module: nn.Module) -> tuple[str, Any]:
    """Path and module of the experts in a decoder layer or MoE block."""
    return next((name, found) for name, found in module.named_modules() if is_experts_module(found))


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the language model's outermost module list that holds experts.

    Raises `UnsupportedModelError` when it has no experts, or none that are fused.
    """
    decoder = set(model.get_decoder().modules())
    modules = {name: module for name, module in model.named_modules() if module in decoder}
    experts = next((name for name, module in modules.items() if is_experts_module(module)), None)
    if experts is None:
        raise UnsupportedModelError(_no_experts(model, modules))
    parts = experts.split(".")
    for length in range(1, len(parts)):
        name = ".".join(parts[:length])
        module = model.get_submodule(name)
        if isinstance(module, nn.ModuleList):
            return name, module
    raise UnsupportedModelError(f"{type(model).__name__} does not keep its experts in a list of decoder layers.")


def find_moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """All MoE layers in order; works on an empty (meta) skeleton too.

    Raises `UnsupportedModelError` when experts or routers are kept in a way that cannot be changed layer by layer.
    """
    layers_name, layers = decoder_layers(model)
    config: Any = model.config
    paths = _experts_paths(model, layers)
    counted = counted_tensors(model)
    routings = layer_routings(config)
    found = []
    for index, path in paths.items():
        prefix = f"{layers_name}.{index}."
        block_path = path.rpartition(".")[0]
        block_name = f"{prefix}{block_path}".rstrip(".")
        inside = [name for name in counted if name.startswith(f"{block_name}.")]
        experts: Any = layers[index].get_submodule(path)
        routing = routings.get(index, FAMILY_ROUTING)
        layer = MoELayer(
            layer=index,
            block_name=block_name,
            block_path=block_path,
            experts_name=prefix + path,
            block=layers[index].get_submodule(block_path),
            experts=experts,
            num_experts=len(experts.down_proj),
            top_k=routing.normalise_over or top_k(config.get_text_config(), index),
            counted={name.removeprefix(prefix): counted.pop(name) for name in inside},
            routing=routing,
            num_groups=routing_groups(config),
        )
        _require_scoring_router(layer)
        found.append(layer)
    if counted:
        raise UnsupportedModelError(
            f"`{min(counted)}` of {type(model).__name__} grows with the number of experts but is no part of an MoE "
            f"block, so layers cannot be changed one by one; {SUPPORTED}."
        )
    return found


def counted_tensors(model: PreTrainedModel) -> dict[str, int]:
    """The tensors with an entry per expert, and in which dimension: what grows when there are twice the experts."""
    num_experts = family_num_experts(model)
    if banks(model.config):  # where routers choose among more than is stored, the family's own form tells
        model = build_skeleton(without_banks(model.config))
    counts = expert_counts(model.config)
    possible = {num_experts, *counts.values()}
    doubled = with_expert_counts(
        model.config, num_experts, 2 * num_experts, {layer: 2 * count for layer, count in counts.items()}
    )
    larger = build_skeleton(doubled).state_dict()
    counted = {}
    for name, tensor in model.state_dict().items():
        growth = [new - old for new, old in zip(larger[name].shape, tensor.shape, strict=True)]
        grown = [dimension for dimension, by in enumerate(growth) if by]
        if grown:
            if len(grown) > 1 or growth[grown[0]] not in possible:
                raise UnsupportedModelError(
                    f"`{name}` of {type(model).__name__} grows with the number of experts, but not by one entry for "
                    f"each; {SUPPORTED}."
                )
            counted[name] = grown[0]
    return counted


def expert_counts(config: Any) -> dict[int, int]:
    """The decoder layers whose number of experts is not the family's own setting, with their number."""
    layers = (getattr(config, SECTION, None) or {}).get("layers", {})
    return {int(layer): found["num_experts"] for layer, found in layers.items() if "num_experts" in found}


def banks(config: Any) -> dict[int, dict[str, Any]]:
    """The decoder layers whose experts are kept in a bank, with what the configuration says of it."""
    layers = (getattr(config, SECTION, None) or {}).get("layers", {})
    return {int(layer): found[BANK] for layer, found in layers.items() if BANK in found}


def owners(config: Any) -> dict[int, int]:
    """The decoder layers whose experts another layer stores, with that layer."""
    return {layer: bank["layer"] for layer, bank in banks(config).items() if "layer" in bank}


def require_no_banks(config: Any, op: str) -> None:
    """Raise `UnsupportedModelError` when the routers of a checkpoint choose among more experts than are stored."""
    if banks(config):
        raise UnsupportedModelError(
            f"`{op}` needs an expert for every row of the router, and this checkpoint was merged or tied with its "
            "routers kept; start from the original."
        )


def without_banks(config: Any) -> Any:
    """A copy of the configuration in which every layer keeps an expert for every row of its router."""
    changed = type(config).from_dict(config.to_dict())
    section = getattr(changed, SECTION)
    layers = {layer: {k: v for k, v in found.items() if k != BANK} for layer, found in section["layers"].items()}
    setattr(changed, SECTION, section | {"layers": layers})
    return changed


def with_expert_counts(config: Any, before: int, num_experts: int, counts: Mapping[int, int]) -> Any:
    """A copy of the configuration with `num_experts` instead of `before` experts per layer.

    `counts` are the new numbers of the layers that it names one by one; those of other layers have no effect.
    """
    changed = type(config).from_dict(config.to_dict())
    section = getattr(changed, SECTION, None)
    set_num_experts(changed, before, num_experts)

    def own_count(layer: int, entry: Mapping[str, Any]) -> bool:
        return layer in counts and ("num_experts" in entry or (BANK not in entry and counts[layer] != num_experts))

    if section:
        layers = {
            layer: found | ({"num_experts": counts[int(layer)]} if own_count(int(layer), found) else {})
            for layer, found in section["layers"].items()
        }
        setattr(changed, SECTION, section | {"num_experts": num_experts, "layers": layers})
    return changed


def with_count_everywhere(config: Any, num_experts: int) -> Any:
    """A copy of the configuration with `num_experts` experts in every MoE layer."""
    model = build_skeleton(config)
    counts = {layer.layer: num_experts for layer in find_moe_layers(model)}
    return with_expert_counts(config, family_num_experts(model), num_experts, counts)


def family_num_experts(model: PreTrainedModel) -> int:
    """Experts per layer as the family's own setting has it; a compressed family's layers may have fewer."""
    section = getattr(model.config, SECTION, None)
    if section:
        return int(section["num_experts"])
    experts: Any = next(module for module in model.modules() if is_experts_module(module))
    return len(experts.down_proj)


def top_k(config: Any, layer: int) -> int:
    """Experts that the router of a decoder layer picks for a token, by the family's own setting."""
    for key in TOP_K_KEYS:
        value = getattr(config, key, None)
        if isinstance(value, list):
            value = value[layer]
        if isinstance(value, int):
            return value
    raise UnsupportedModelError(f"The configuration of {config.model_type} does not say how many experts a token uses.")


def set_num_experts(config: Any, before: int, after: int) -> None:
    """Change the expert count in a configuration, under every name it has there."""
    text = config.get_text_config()
    keys = [key for key in EXPERT_COUNT_KEYS if key in text.to_dict() and getattr(text, key) == before]
    if not keys:
        raise UnsupportedModelError(f"The configuration of {text.model_type} does not say how many experts it has.")
    for key in keys:
        setattr(text, key, after)


def divides_gates(config: Any) -> bool:
    """Whether the family's routers divide the gate values of the experts they pick by their sum."""
    text = config.get_text_config()
    family = text.model_type.removeprefix("compressed_")
    if family in UNDIVIDED_GATES or family in DIVIDED_GATES:
        return family in DIVIDED_GATES
    of_those_picked = getattr(text, "expert_selection_fn", None) == "softmax"  # cohere2_moe
    return of_those_picked or bool(getattr(text, "norm_topk_prob", True))


def has_fixed_top_k(config: Any) -> bool:
    """Whether the code of the family's routers allows one top-k only."""
    return config.get_text_config().model_type.removeprefix("compressed_") in FIXED_TOP_K


def routing_groups(config: Any) -> int:
    """Groups the router limits its choice to (DeepSeek's `n_group`); 1 without such groups."""
    return int(getattr(config.get_text_config(), "n_group", None) or 1)


def _experts_paths(model: PreTrainedModel, layers: nn.ModuleList) -> dict[int, str]:
    """Where each MoE layer keeps its experts, by its index among the decoder layers."""
    paths = {}
    for index, layer in enumerate(layers):
        found = [path for path, module in layer.named_modules() if is_experts_module(module)]
        if len(found) > 1:
            raise UnsupportedModelError(
                f"Layer {index} of {type(model).__name__} has {len(found)} sets of experts (`{'` and `'.join(found)}`) "
                f"and text reaches only one of them; {SUPPORTED}."
            )
        if found:
            paths[index] = found[0]
    return paths


def _require_scoring_router(layer: MoELayer) -> None:
    """Refuse a router that was not found, or that looks experts up instead of scoring them."""
    router = layer.router_tensors()
    if not router:
        raise UnsupportedModelError(
            f"The router of `{layer.block_name}` ({type(layer.block).__name__}) was not found; {SUPPORTED}."
        )
    modules = {name.rpartition(".")[0] for name in router}
    for name, tensor in layer.block.state_dict().items():
        if name.rpartition(".")[0] in modules and not tensor.is_floating_point():
            raise UnsupportedModelError(
                f"The router of `{layer.block_name}` looks experts up by their number in `{name}`, so none of them can "
                f"be left out; {SUPPORTED}."
            )


def _no_experts(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> str:
    """Why no fused experts were found, in a sentence."""
    for name, module in modules.items():
        if name.endswith(".experts"):
            kept = f"{type(model).__name__} keeps its experts as `{name}` ({type(module).__name__})"
            return f"{kept}, which is none of transformers' fused experts modules; {SUPPORTED}."
    return f"{type(model).__name__} has no routed experts, so there is nothing to compress; {SUPPORTED}."
