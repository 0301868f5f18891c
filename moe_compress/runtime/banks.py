"""Layers whose routers choose among more experts than are stored: the runtime of merged and tied models.

The section `moe_compress` of `config.json` describes the bank of a layer under `layers.<index>.bank`:

| key | meaning |
|---|---|
| `experts` | stored experts b |
| `slots` | for each routed expert the stored one that runs, or null: a constant stands for it; absent: its own |
| `ranks` | projection -> rank of each routed expert's difference from its stored one; absent: no differences |
| `layer` | the layer that stores the experts, when it is not this one |

A stored expert whose members differ from it runs once for all tokens of the members: its first product is computed once
per token, and every member adds its own two thin products. Dense experts are never built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.models.experts import (
    expert_inner,
    expert_weight,
    experts_forward,
    matrix_shape,
    part_rows,
    projections,
    routed_tokens,
)
from moe_compress.models.linear import linear


@dataclass(frozen=True)
class Bank:
    """What the experts of a layer are made of; the fields are those of the table above."""

    experts: int
    slots: tuple[int | None, ...]
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layer: int | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Bank:
        ranks = {part: tuple(values) for part, values in content.get("ranks", {}).items()}
        slots = tuple(content.get("slots") or range(content["experts"]))
        return cls(content["experts"], slots, ranks, content.get("layer"))

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"experts": self.experts}
        if self.slots != tuple(range(self.experts)):
            found["slots"] = list(self.slots)
        if self.ranks:
            found["ranks"] = {part: list(values) for part, values in self.ranks.items()}
        return found if self.layer is None else found | {"layer": self.layer}

    @property
    def constants(self) -> list[int]:
        """The routed experts that are constants, in the order of their rows."""
        return [expert for expert, slot in enumerate(self.slots) if slot is None]


def stored_tensors(experts: Any) -> list[str]:
    """Names of an experts module's own tensors, each [b, ...]."""
    names = list(projections(experts))
    return names + ([f"{name}_bias" for name in names] if experts.has_bias else [])


def part_shapes(experts: Any) -> dict[str, tuple[int, int]]:
    """Rows and columns of one expert's gate (if any), up and down projections, from its fused parameters."""
    shapes: dict[str, tuple[int, int]] = {}
    for name in projections(experts):
        rows, columns = matrix_shape(experts, getattr(experts, name))
        parts = part_rows(experts, name, rows)
        shapes |= {part: (rows // len(parts), columns) for part in parts}
    return shapes


def short(part: str) -> str:
    """A projection's name in those of the differences: not its own, which conversions of some families look for."""
    return part.removesuffix("_proj")


class Differences(nn.Module):
    """What tells the routed experts of a bank from the stored ones, for every projection.

    A routed expert's matrix is scale times that of its slot, plus left^T right. `gate_left` [R, out], `gate_right`
    [R, in] and so on hold the factors of all experts one below the other, R being the sum of their ranks; `gate_scale`
    is [E]. Biases are the routed experts' own.
    """

    def __init__(self, experts: Any, bank: Bank) -> None:
        super().__init__()
        self.ranges: dict[str, list[tuple[int, int]]] = {}
        like, routed = experts.down_proj, len(bank.slots)
        for part, (rows, columns) in part_shapes(experts).items():
            ends = [0, *accumulate(bank.ranks[part])]
            self.ranges[part] = list(pairwise(ends))
            for side, shape in (("left", (ends[-1], rows)), ("right", (ends[-1], columns)), ("scale", (routed,))):
                self.register_parameter(f"{short(part)}_{side}", nn.Parameter(like.new_ones(shape)))
        if experts.has_bias:
            for name in projections(experts):
                bias = getattr(experts, f"{name}_bias")
                self.register_parameter(f"{name}_bias", nn.Parameter(bias.new_zeros(routed, bias.shape[1])))

    def factors(self, part: str, expert: int) -> tuple[Tensor, Tensor]:
        """Views of left [r, out] and right [r, in] of one routed expert."""
        start, stop = self.ranges[part][expert]
        left, right = (self.get_parameter(f"{short(part)}_{side}") for side in ("left", "right"))
        return left[start:stop], right[start:stop]

    def product(self, part: str, expert: int, slot_NO: Tensor, input_NI: Tensor) -> Tensor:
        """An expert's product [N, out] with its inputs, from that of its slot."""
        left, right = (factor.to(input_NI.dtype) for factor in self.factors(part, expert))
        scale = self.get_parameter(f"{short(part)}_scale")[expert].to(input_NI.dtype)
        return slot_NO * scale + input_NI @ right.T @ left


class BankedExperts(nn.Module):
    """Mixed into the experts class of a layer that has a bank; its router's choices are those of `bank.slots`."""

    bank: Bank
    differences: Differences | None
    constants: nn.Parameter | None  # [C, H]
    config: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The gated sum of the routed experts' outputs."""
        routed_TH: Tensor
        if self.differences is not None:
            routed_TH = _with_differences(self, hidden_states, top_k_index, top_k_weights)
        else:
            slot_TK = _lookup(self.bank.slots, self.bank.experts, top_k_index)
            gate_TK = top_k_weights.masked_fill(slot_TK >= self.bank.experts, 0)
            # A family's own code may not expect a choice that is no expert; the registered functions do.
            is_eager = self.constants is not None and self.config._experts_implementation == "eager"
            routed_TH = (
                experts_forward(self, hidden_states, slot_TK, gate_TK)
                if is_eager
                else super().forward(hidden_states, slot_TK, gate_TK)
            )
        if self.constants is not None:
            routed_TH = routed_TH + self._constant_part(top_k_index, top_k_weights).to(routed_TH.dtype)
        return routed_TH

    def routed_slots(self, index_TK: Tensor, gate_TK: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Every stored expert with tokens and its positions in the flattened routing table.

        Those of one routed expert come together where routed experts differ from their slots.
        """
        bank = self.bank
        if self.differences is None:
            yield from routed_tokens(_lookup(bank.slots, bank.experts, index_TK), gate_TK, bank.experts)
            return
        pairs = dict(routed_tokens(index_TK, gate_TK, len(bank.slots)))
        for slot in range(bank.experts):
            found = [pair_N for expert, pair_N in pairs.items() if bank.slots[expert] == slot]
            if found:
                yield slot, torch.cat(found)

    def slot_inner(self, slot: int, hidden_TH: Tensor, index_TK: Tensor, pair_N: Tensor) -> Tensor:
        """Inputs [N, F] of a stored expert's down projection, for positions that `routed_slots` gave with it."""
        token_N = pair_N // index_TK.shape[1]
        if self.differences is None:
            return expert_inner(self, slot, hidden_TH.index_select(0, token_N))
        first = next(iter(projections(self)))
        token_U, unique_N = token_N.unique(return_inverse=True)  # a token that chose two members is computed once
        shared_UF = linear(hidden_TH[token_U], expert_weight(self, first, slot, hidden_TH.dtype))
        expert_N = index_TK.flatten()[pair_N]
        mixed_NF = _own_products(self, first, expert_N, shared_UF[unique_N], hidden_TH[token_N])
        module: Any = self
        inner_NF: Tensor = module._apply_gate(mixed_NF) if module.has_gate else module.act_fn(mixed_NF)
        return inner_NF

    def _constant_part(self, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """Sum of gate values times constants, [T, H]."""
        assert self.constants is not None
        row = {expert: number for number, expert in enumerate(self.bank.constants)}
        row_TK = _lookup([row.get(expert) for expert in range(len(self.bank.slots))], len(row), index_TK)
        gate_TC = gate_TK.new_zeros(len(index_TK), len(row) + 1).scatter_add(1, row_TK, gate_TK)
        return gate_TC[:, :-1] @ self.constants.to(gate_TK.dtype)


def furnish(experts: Any, bank: Bank) -> None:
    """Give a fused experts module the parameters of its bank; their values are yet to be loaded."""
    for name in stored_tensors(experts):
        tensor = getattr(experts, name)
        fitting = tensor.new_empty(bank.experts, *tensor.shape[1:])
        setattr(experts, name, nn.Parameter(fitting, requires_grad=tensor.requires_grad))
    experts.num_experts, experts.bank = bank.experts, bank
    experts.differences = Differences(experts, bank) if bank.ranks else None
    constants = None
    if bank.constants:
        constants = nn.Parameter(experts.down_proj.new_zeros(len(bank.constants), part_shapes(experts)["down_proj"][0]))
    experts.register_parameter("constants", constants)


def run_banked(experts: Any) -> None:
    """Make an experts module that was furnished, and perhaps packed since, run as its bank says."""
    experts._is_expert_parallel = bool(experts.bank.constants)  # so that nothing is computed for what has no slot
    base = type(experts)
    experts.__class__ = type(f"Banked{base.__name__}", (BankedExperts, base), {"__module__": __name__})


def share(experts: Any, owner: Any) -> None:
    """Let a module use the stored experts of another one, packed alike; nothing is copied."""
    for name in stored_tensors(experts):
        if name in owner._parameters:
            experts._parameters[name] = owner._parameters[name]
    for part in _parts(experts):
        if part in owner._modules:
            experts._modules[part] = owner._modules[part]


def shared_tensors(owner: Any) -> list[str]:
    """The names of what `share` lets another module use."""
    own = [name for name in stored_tensors(owner) if name in owner._parameters]
    packed = [
        f"{part}.{name}" for part in _parts(owner) if part in owner._modules for name in owner._modules[part]._buffers
    ]
    return own + packed


def _parts(experts: Any) -> list[str]:
    return [part for parts in projections(experts).values() for part in parts]


def dense_experts(experts: Any) -> dict[str, Tensor]:
    """The tensors [E, ...] of a plain experts module that computes what a banked one without constants does."""
    bank, differences = experts.bank, experts.differences
    slots = torch.tensor(bank.slots)
    found = {name: getattr(experts, name)[slots.to(getattr(experts, name).device)] for name in stored_tensors(experts)}
    if differences is None:
        return found
    for name in projections(experts):
        for expert in range(len(bank.slots)):
            matrix_OI = expert_weight(experts, name, bank.slots[expert], torch.float32)
            dense_OI = torch.empty_like(matrix_OI)
            for part, rows in part_rows(experts, name, len(matrix_OI)).items():
                left, right = (factor.float() for factor in differences.factors(part, expert))
                scale = differences.get_parameter(f"{short(part)}_scale")[expert].float()
                dense_OI[rows] = scale * matrix_OI[rows] + left.T @ right
            found[name][expert] = (dense_OI.T if experts.is_transposed else dense_OI).to(found[name])
        if experts.has_bias:
            found[f"{name}_bias"] = differences.get_parameter(f"{name}_bias").to(found[f"{name}_bias"])
    return found


def _lookup(table: Sequence[int | None], default: int, index_TK: Tensor) -> Tensor:
    """The entry of each chosen expert; `default` for None and for what is no routed expert."""
    entries = [*(default if entry is None else entry for entry in table), default]
    return torch.tensor(entries, device=index_TK.device)[index_TK.clamp(max=len(table))]


def _with_differences(experts: Any, hidden_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """Gated sum [T, H] of the outputs of routed experts that differ from their slots; see `experts_forward`."""
    observer = getattr(experts, "observer", None)
    known: dict[int, Tensor] = experts.__dict__.pop("known_inner", {})
    routed_TH = torch.zeros_like(hidden_TH)
    for slot, pair_N in experts.routed_slots(index_TK, gate_TK):
        inner_NF = known.pop(slot, None)
        if inner_NF is None:
            inner_NF = experts.slot_inner(slot, hidden_TH, index_TK, pair_N)
        shared_NH = linear(inner_NF, expert_weight(experts, "down_proj", slot, hidden_TH.dtype))
        output_NH = _own_products(experts, "down_proj", index_TK.flatten()[pair_N], shared_NH, inner_NF)
        output_NH = experts.post_expert_norm(output_NH) if experts.has_post_expert_norm else output_NH
        token_N, gate_N = pair_N // index_TK.shape[1], gate_TK.flatten()[pair_N]
        if observer is not None:
            observer.expert(slot, token_N, gate_N, output_NH)
        gated_NH = output_NH * gate_N[:, None].to(output_NH.dtype)
        routed_TH.index_add_(0, token_N, gated_NH.to(routed_TH.dtype))  # which autocast makes unlike
    if observer is not None:
        slot_TK = _lookup(experts.bank.slots, experts.bank.experts, index_TK)
        observer.block(slot_TK.masked_fill(gate_TK == 0, experts.bank.experts), routed_TH)
    return routed_TH


def _own_products(experts: Any, name: str, expert_N: Tensor, slot_NO: Tensor, input_NI: Tensor) -> Tensor:
    """The own products [N, out] of routed experts (in runs) with a fused matrix, from those of their slot."""
    differences: Differences = experts.differences
    rows = part_rows(experts, name, slot_NO.shape[1])
    members, counts = expert_N.unique_consecutive(return_counts=True)
    sizes = counts.tolist()
    found = []
    pieces = zip(members.tolist(), slot_NO.split(sizes), input_NI.split(sizes), strict=True)
    for expert, slot_MO, input_MI in pieces:
        products = [differences.product(part, expert, slot_MO[:, where], input_MI) for part, where in rows.items()]
        if len(products) == 1:
            own_MO = products[0]
        elif experts.is_concatenated:
            own_MO = torch.cat(products, dim=-1)
        else:  # gate and up alternate
            own_MO = torch.stack(products, dim=-1).flatten(-2)
        if experts.has_bias:
            own_MO = own_MO + differences.get_parameter(f"{name}_bias")[expert].to(own_MO.dtype)
        found.append(own_MO)
    return torch.cat(found)
