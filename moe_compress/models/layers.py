"""What an MoE layer is, in every architecture: found by structure, not by a list of names.

`transformers` marks every fused experts module with `use_experts_implementation`: the experts are 3-D parameters whose
first dimension is the expert, and the module carries the flags `is_transposed`, `has_bias`, `has_gate`. The block that
owns it also owns the router: tensors with one row per expert. What structure does not tell is in `families.py`.

Not covered: experts kept as a list of separate modules, and routers that share one tensor between layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_compress.errors import UnsupportedModelError
from moe_compress.models.families import EXPERT_COUNT_KEYS, TOP_K_KEYS


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model: where its experts and its router live."""

    layer: int  # index among the decoder layers
    block_name: str  # the module that owns experts and router, in the model
    block_path: str  # the same inside its decoder layer
    experts_name: str
    block: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int

    def expert_tensors(self) -> dict[str, Tensor]:
        """The experts' tensors by name relative to the block, each [E, ...]."""
        prefix = self.experts_name[len(self.block_name) + 1 :]
        return {f"{prefix}.{name}": tensor for name, tensor in _tensors(self.experts)}

    def router_tensors(self) -> dict[str, tuple[Tensor, int]]:
        """The router's tensors by name relative to the block, each with the dimension that counts the experts."""
        found: dict[str, tuple[Tensor, int]] = {}
        experts = self.expert_tensors()
        for name, tensor in _tensors(self.block):
            if name in experts or "shared" in name:
                continue
            if tensor.shape[0] == self.num_experts:
                found[name] = (tensor, 0)
            elif tensor.shape == (1, self.num_experts):
                found[name] = (tensor, 1)
        return found


def is_experts_module(module: nn.Module) -> bool:
    """Whether this is a fused experts module."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "down_proj")


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: the outermost module list that holds experts.

    Raises `UnsupportedModelError` when the model has no experts.
    """
    names = [name for name, module in model.named_modules() if is_experts_module(module)]
    if not names:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no routed experts, so there is nothing to compress; "
            "supported are the Mixture-of-Experts models of transformers (see `docs/architectures.md`)."
        )
    parts = names[0].split(".")
    for length in range(1, len(parts)):
        name = ".".join(parts[:length])
        module = model.get_submodule(name)
        if isinstance(module, nn.ModuleList):
            return name, module
    raise UnsupportedModelError(f"{type(model).__name__} does not keep its experts in a list of decoder layers.")


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """All MoE layers in order; works on an empty (meta) skeleton too."""
    layers_name, _ = decoder_layers(model)
    pattern = re.compile(re.escape(layers_name) + r"\.(\d+)\.")
    config: Any = model.config
    config = config.get_text_config()
    found = []
    for name, module in model.named_modules():
        match = pattern.match(name)
        if match and is_experts_module(module):
            block_name = name.rpartition(".")[0]
            block = model.get_submodule(block_name)
            num_experts = int(module.down_proj.shape[0])
            path = block_name[match.end() :]
            layer = MoELayer(int(match[1]), block_name, path, name, block, module, num_experts, top_k(config))
            if not layer.router_tensors():
                raise UnsupportedModelError(
                    f"The router of `{block_name}` ({type(block).__name__}) was not recognised."
                )
            found.append(layer)
    return found


def top_k(config: Any) -> int:
    """Routed experts per token."""
    for key in TOP_K_KEYS:
        if isinstance(value := getattr(config, key, None), int):
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


def routing_groups(config: Any) -> int:
    """Groups the router limits its choice to (DeepSeek's `n_group`); 1 without such groups."""
    return int(getattr(config.get_text_config(), "n_group", None) or 1)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    persistent = module.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)
