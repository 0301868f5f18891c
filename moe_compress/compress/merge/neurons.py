"""One expert as a matrix with a row for each of its hidden neurons.

Permuting the rows changes nothing that the expert computes: a neuron's row holds all its weights (its rows of the gate
and up projections, their biases, its column of the down projection). What belongs to no neuron, the bias of the down
projection, is kept apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compress.models.experts import expert_weight, part_rows, projections

DOWN = "down_proj"


@dataclass(frozen=True)
class Expert:
    """The parts of one expert by neuron, all float32: `gate_proj` (if any) and `up_proj` [F, H], `down_proj` [F, H].

    With biases also `gate_proj_bias` and `up_proj_bias` [F, 1]. `offset` [H] is the bias of the down projection.
    """

    parts: dict[str, Tensor]
    offset: Tensor | None = None

    @property
    def rows_FD(self) -> Tensor:
        """All that a neuron has, one row each."""
        return torch.cat(list(self.parts.values()), dim=1)

    def permuted(self, order_F: Tensor) -> Expert:
        """The same function with its neurons in this order."""
        return Expert({name: part[order_F] for name, part in self.parts.items()}, self.offset)


def read_expert(experts: Any, expert: int) -> Expert:
    """An expert of a fused experts module, or of what stands for one."""
    first = next(iter(projections(experts)))
    fused = expert_weight(experts, first, expert, torch.float32)
    rows = part_rows(experts, first, len(fused))
    parts = {part: fused[where] for part, where in rows.items()}
    parts[DOWN] = expert_weight(experts, DOWN, expert, torch.float32).T
    if not experts.has_bias:
        return Expert(parts)
    bias = getattr(experts, f"{first}_bias")[expert].float()
    parts |= {f"{part}_bias": bias[where, None] for part, where in rows.items()}
    return Expert(parts, getattr(experts, f"{DOWN}_bias")[expert].float())


def write_expert(experts: Any, slot: int, expert: Expert) -> None:
    """Put an expert into a slot of a fused experts module, rounded to the module's type."""
    first = next(iter(projections(experts)))
    fused = torch.empty_like(expert_weight(experts, first, slot, torch.float32))
    rows = part_rows(experts, first, len(fused))
    for part, where in rows.items():
        fused[where] = expert.parts[part]
    for name, matrix in ((first, fused), (DOWN, expert.parts[DOWN].T)):
        getattr(experts, name).data[slot].copy_(matrix.T if experts.is_transposed else matrix)
    if experts.has_bias:
        assert expert.offset is not None
        bias = getattr(experts, f"{first}_bias").data[slot]
        for part, where in rows.items():
            bias[where] = expert.parts[f"{part}_bias"][:, 0].to(bias.dtype)
        getattr(experts, f"{DOWN}_bias").data[slot].copy_(expert.offset)


def inner_activations(experts: Any, expert: Expert, hidden_NH: Tensor) -> Tensor:
    """What enters an expert's down projection [N, F], by the activation of a fused experts module."""
    names = [name for name in ("gate_proj", "up_proj") if name in expert.parts]
    found = []
    for name in names:
        product_NF = hidden_NH @ expert.parts[name].T
        bias = expert.parts.get(f"{name}_bias")
        found.append(product_NF if bias is None else product_NF + bias[:, 0])
    fused_NF = torch.cat(found, dim=1) if experts.is_concatenated else torch.stack(found, dim=-1).flatten(-2)
    activated_NF: Tensor = experts._apply_gate(fused_NF) if experts.has_gate else experts.act_fn(fused_NF)
    return activated_NF


class Original:
    """An experts module with tensors of its own: those of a layer before it was changed."""

    def __init__(self, experts: Any, tensors: dict[str, Tensor]) -> None:
        self._experts, self._tensors = experts, tensors

    def __getattr__(self, name: str) -> Any:
        tensors = object.__getattribute__(self, "_tensors")
        return tensors[name] if name in tensors else getattr(object.__getattribute__(self, "_experts"), name)
