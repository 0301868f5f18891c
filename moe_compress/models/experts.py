"""How routed experts run while we look at them or hold them in storage precision.

`transformers` calls whatever function is registered under the configured experts implementation with the hidden states
[T, H], the chosen experts [T, K] and the values [T, K] that multiply their outputs. Ours computes only routed tokens,
upcasts one expert at a time to the precision of the hidden states, and lets an observer see every raw output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_compress.models.linear import linear

IMPLEMENTATION = "moe_compress"


class Observer(Protocol):
    """Sees one call of an experts module."""

    def expert(self, expert: int, token_N: Tensor, gate_N: Tensor, output_NH: Tensor) -> None:
        """The raw outputs of one expert for the tokens routed to it."""

    def block(self, index_TK: Tensor, routed_output_TH: Tensor) -> None:
        """The routing of all tokens and the gated sum of the experts' outputs."""


def projections(experts: Any) -> dict[str, tuple[str, ...]]:
    """The fused matrices of an experts module, and the projections that each holds one above the other.

    Gate and up projections whose rows alternate cannot be told apart by rows, and are one.
    """
    if not experts.has_gate:
        return {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}
    apart = experts.is_concatenated and not experts.is_transposed
    return {"gate_up_proj": ("gate_proj", "up_proj") if apart else ("gate_up_proj",), "down_proj": ("down_proj",)}


def part_rows(experts: Any, name: str, rows: int) -> dict[str, slice]:
    """The projections in a fused matrix of `rows` rows, and the rows of each, alternating ones told apart too."""
    if not experts.has_gate or name == "down_proj":
        return {name: slice(None)}
    if experts.is_concatenated:
        return {"gate_proj": slice(rows // 2), "up_proj": slice(rows // 2, None)}
    return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}


def matrix_shape(experts: Any, fused: Tensor) -> tuple[int, int]:
    """Rows and columns [out, in] of one expert's matrix in a fused parameter [E, ...]."""
    _, first, second = fused.shape
    return (second, first) if experts.is_transposed else (first, second)


def expert_weight(experts: Any, name: str, expert: int, dtype: torch.dtype) -> Tensor:
    """Matrix [out, in] of one expert in `dtype`, from a fused parameter or as a packed experts module keeps it."""
    if hasattr(experts, "expert_weight"):
        packed: Tensor = experts.expert_weight(name, expert, dtype)
        return packed
    weight: Tensor = getattr(experts, name)[expert].to(dtype)
    return weight.T if experts.is_transposed else weight


def _linear(experts: Any, expert: int, inputs: Tensor, name: str) -> Tensor:
    """Inputs [N, in] times one expert's matrix."""
    bias = getattr(experts, f"{name}_bias")[expert].to(inputs.dtype) if experts.has_bias else None
    return linear(inputs, expert_weight(experts, name, expert, inputs.dtype), bias)


def expert_inner(experts: Any, expert: int, hidden_NH: Tensor) -> Tensor:
    """Inputs [N, F] of one expert's down projection."""
    if experts.has_gate:
        return experts._apply_gate(_linear(experts, expert, hidden_NH, "gate_up_proj"))  # type: ignore[no-any-return]
    return experts.act_fn(_linear(experts, expert, hidden_NH, "up_proj"))  # type: ignore[no-any-return]


def expert_output(experts: Any, expert: int, inner_NF: Tensor) -> Tensor:
    """Raw output [N, H] of one expert for what `expert_inner` gave, before its gate value."""
    output_NH = _linear(experts, expert, inner_NF, "down_proj")
    return experts.post_expert_norm(output_NH) if experts.has_post_expert_norm else output_NH


def whole_expert(experts: Any, expert: int, hidden_NH: Tensor) -> Tensor:
    """Raw output [N, H] of one expert for its inputs."""
    return expert_output(experts, expert, expert_inner(experts, expert, hidden_NH))


def routed_tokens(index_TK: Tensor, gate_TK: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """For every expert with tokens: its index and its positions in the flattened routing table, ascending.

    An index of `num_experts` or more is no expert and is left out. A gate value of exactly zero says that the token
    skips the expert, whatever its index says (so in ZAYA).
    """
    index_TK = index_TK.masked_fill(gate_TK == 0, num_experts)
    order = index_TK.flatten().argsort(stable=True)
    counts = torch.bincount(index_TK.flatten(), minlength=num_experts)[:num_experts].tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, order[start : start + count]
        start += count


def routed_experts(experts: Any, index_TK: Tensor, gate_TK: Tensor) -> Iterator[tuple[int, Tensor]]:
    """`routed_tokens` for the stored experts of a module, whatever its router calls them."""
    if hasattr(experts, "routed_slots"):
        yield from experts.routed_slots(index_TK, gate_TK)
    else:
        yield from routed_tokens(index_TK, gate_TK, len(experts.down_proj))


def routed_inner(experts: Any, expert: int, hidden_TH: Tensor, index_TK: Tensor, slot_N: Tensor) -> Tensor:
    """Inputs [N, F] of a stored expert's down projection, for positions that `routed_experts` gave with it."""
    if hasattr(experts, "slot_inner"):
        inner_NF: Tensor = experts.slot_inner(expert, hidden_TH, index_TK, slot_N)
        return inner_NF
    return expert_inner(experts, expert, hidden_TH.index_select(0, slot_N // index_TK.shape[1]))


def experts_forward(experts: Any, hidden_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """Gated sum [T, H] of the routed experts' outputs; bit-identical from run to run.

    `known_inner` on the module, by expert, is what `expert_inner` gave for these very tokens; it is used up.
    """
    observer: Observer | None = getattr(experts, "observer", None)
    known: dict[int, Tensor] = experts.__dict__.pop("known_inner", {})
    top_k = index_TK.shape[1]
    routed_TH = torch.zeros_like(hidden_TH)
    num_experts = experts.num_experts if hasattr(experts, "expert_weight") else len(experts.down_proj)
    for expert, slot_N in routed_tokens(index_TK, gate_TK, num_experts):
        token_N = slot_N // top_k
        inner_NF = known.pop(expert, None)
        if inner_NF is None:
            inner_NF = expert_inner(experts, expert, hidden_TH.index_select(0, token_N))
        output_NH = expert_output(experts, expert, inner_NF)
        gate_N = gate_TK.flatten()[slot_N]
        if observer is not None:
            observer.expert(expert, token_N, gate_N, output_NH)
        routed_TH.index_add_(0, token_N, output_NH * gate_N[:, None].to(output_NH.dtype))
    if observer is not None:
        observer.block(index_TK.masked_fill(gate_TK == 0, num_experts), routed_TH)
    return routed_TH


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
