"""Routers with rows for zero experts, and the original routers inside them.

`use_zero_experts: false` in the section of a configuration, or `use_zero_experts(model, False)`, runs every router with
its original rows alone: the model that zero experts were added to, to the last bit. The weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.models.layers import experts_of
from moe_compress.models.routing import router_rows


@dataclass
class Widened:
    """What a router with zero experts has more than the family's: tensors by name with the dimension of their rows,
    and settings (the path of a module, a name, the family's value), all inside the block."""

    tensors: dict[str, int] = field(default_factory=dict)
    settings: list[tuple[str, str, int]] = field(default_factory=list)
    rows: list[int] | None = None  # of the routed experts, where these are not the first ones


def use_zero_experts(model: nn.Module, on: bool) -> None:
    """Run a model with its zero experts, or as the original that it was made from; its weights stay as they are."""
    for block in model.modules():
        widened = getattr(block, "widened", None)
        if widened is None:
            continue
        _, experts = experts_of(block)
        experts.routing_rules.zero_experts = on
        if on and isinstance(block, _OriginalRouting):
            block.__class__ = type(block).__bases__[1]
        elif not on and not isinstance(block, _OriginalRouting):
            base = type(block)
            block.__class__ = type(f"Original{base.__name__}", (_OriginalRouting, base), {"__module__": __name__})


def add_zero_experts(layers: nn.ModuleList, index: int, donated: nn.Module, count: int, num_groups: int) -> None:
    """Exchange layer `index` for `donated`, whose router has `count` rows more, with the experts it had.

    What the router has more is noted on its block (`Widened`).
    """
    path, experts = experts_of(layers[index])
    block_path = path.rpartition(".")[0]
    own, block = layers[index].get_submodule(block_path), donated.get_submodule(block_path)
    donated.set_submodule(path, experts)
    layers[index] = donated
    widened = Widened()
    shapes = {name: tensor.shape for name, tensor in own.state_dict().items()}
    for name, tensor in block.state_dict().items():
        grown = [dimension for dimension, size in enumerate(tensor.shape) if size != shapes[name][dimension]]
        if grown:
            widened.tensors[name] = grown[0]
    originals = dict(own.named_modules())
    for name, module in block.named_modules():
        settings = {key: value for key, value in vars(originals[name]).items() if type(value) is int}
        widened.settings += [(name, key, value) for key, value in settings.items() if getattr(module, key) != value]
    if num_groups > 1:
        widened.rows, _ = router_rows(len(experts.down_proj), count, num_groups)
    block.widened = widened  # type: ignore[assignment]


class _OriginalRouting(nn.Module):
    """Mixed into a block's class: during a call, its router is the one without zero experts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _narrowed(self):
            return super().forward(*args, **kwargs)


@contextmanager
def _narrowed(block: Any) -> Iterator[None]:
    """Take what the router has more out of a block for a while."""
    widened: Widened = block.widened
    _, experts = experts_of(block)
    tensors, settings = [], []
    try:
        for name, dimension in widened.tensors.items():
            path, _, leaf = name.rpartition(".")
            module = block.get_submodule(path)
            table = module._parameters if leaf in module._parameters else module._buffers
            tensors.append((table, leaf, table[leaf]))
            table[leaf] = _original_rows(table[leaf], dimension, widened, experts.routing_rules)
        for path, key, value in widened.settings:
            module = block.get_submodule(path)
            settings.append((module, key, getattr(module, key)))
            setattr(module, key, value)
        yield
    finally:
        for table, leaf, tensor in tensors:
            table[leaf] = tensor
        for module, key, value in settings:
            setattr(module, key, value)


def _original_rows(tensor: Tensor, dimension: int, widened: Widened, rules: Any) -> Tensor:
    """The entries of a router tensor that are not zero experts'."""
    start = rules.num_experts + rules.routing.zero_experts
    beyond = tensor.narrow(dimension, start, tensor.shape[dimension] - start)
    if widened.rows is not None:
        own = tensor.index_select(dimension, torch.tensor(widened.rows, device=tensor.device))
    else:
        own = tensor.narrow(dimension, 0, rules.num_experts)
    return torch.cat([own, beyond], dimension) if beyond.shape[dimension] else own
