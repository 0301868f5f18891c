"""Which parameters are trained: named by part, found by structure, a tied tensor counted once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moe_compress.errors import UsageError
from moe_compress.models.layers import MoELayer

EXPERTS, RESIDUALS, ROUTERS, NORMS, OTHERS = "experts", "residuals", "routers", "norms", "others"


def parts(parameters: Mapping[str, Tensor], moe_layers: Iterable[MoELayer]) -> dict[str, str]:
    """The part of each parameter of a model, by name; `others` are attention, embeddings and the like.

    Inside an experts module, what counts experts is `experts`, and what a bank adds to it `residuals`. A router is the
    modules that hold its tensors. Norms are vectors whose module calls itself so.
    """
    found = {
        name: NORMS if tensor.ndim == 1 and "norm" in name.lower() else OTHERS for name, tensor in parameters.items()
    }
    for moe in moe_layers:
        experts = {f"{moe.block_name}.{name}" for name in moe.expert_tensors()}
        routers = {f"{moe.block_name}.{name}" for name in moe.router_tensors()}
        modules = tuple(f"{path}." for name in routers if (path := name.rpartition(".")[0]) != moe.block_name)
        for name in parameters:
            if name in experts:
                found[name] = EXPERTS
            elif name.startswith(f"{moe.experts_name}."):
                found[name] = RESIDUALS
            elif name in routers or name.startswith(modules):
                found[name] = ROUTERS
    return found


def chosen(by_part: Mapping[str, str], trainable: Sequence[str]) -> list[str]:
    """The names of the parameters to train, of those that `parts` sorted.

    Raises `UsageError` when a part that is named has none of them.
    """
    absent = [part for part in trainable if part != "all" and part not in by_part.values()]
    if absent:
        why = (
            "only tied experts and merged ones with differences have them" if absent[0] == RESIDUALS else "name others"
        )
        raise UsageError(f"`trainable` names {absent[0]}, but this checkpoint has none; {why}.")
    return [name for name, part in by_part.items() if part in trainable or "all" in trainable]


def aliases(model: nn.Module) -> dict[str, str]:
    """Every name that a parameter has, with the first one, which `named_parameters` gives."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def groups(
    parameters: Mapping[str, nn.Parameter], by_part: Mapping[str, str], users: Mapping[str, int], weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups of the parameters to train: matrices decay, vectors do not.

    `users` says how many layers use a tensor. A bank that n layers use learns at 1/sqrt(n) of the rate
    (arXiv 2606.16825); a group's `scale` is this factor.
    """
    made: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        scale = 1 / math.sqrt(users.get(name, 1)) if by_part[name] == EXPERTS else 1.0
        made.setdefault((scale, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": found, "scale": scale, "weight_decay": decay} for (scale, decay), found in made.items()]


def users(model: nn.Module) -> Mapping[str, int]:
    """How many modules use each parameter, by its first name."""
    return Counter(aliases(model).values())
