"""How routed experts run while we look at them or hold them in storage precision.

`transformers` calls whatever function is registered under the configured experts implementation with the hidden states
[T, H], the chosen experts [T, K] and the values [T, K] that multiply their outputs. Ours computes only routed tokens,
upcasts one expert at a time to the precision of the hidden states, and lets an observer see every raw output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

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


def expert_output(experts: Any, expert: int, hidden_NH: Tensor) -> Tensor:
    """Raw output [N, H] of one expert of a fused experts module, before its gate value, in the inputs' dtype.

    A `recorder` on the module is called with the expert, its inputs, and the inputs [N, F] of its down projection; if
    it has seen enough then (returns True), the output is 0.
    """

    def linear(inputs: Tensor, name: str) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[expert].to(inputs.dtype) if experts.has_bias else None
        return F.linear(inputs, expert_weight(experts, name, expert, inputs.dtype), bias)

    if experts.has_gate:
        inner = experts._apply_gate(linear(hidden_NH, "gate_up_proj"))
    else:
        inner = experts.act_fn(linear(hidden_NH, "up_proj"))
    if hasattr(experts, "recorder") and experts.recorder(expert, hidden_NH, inner):
        return torch.zeros_like(hidden_NH)
    output = linear(inner, "down_proj")
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output


def routed_tokens(index_TK: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """For every expert with tokens: its index and its positions in the flattened routing table, ascending.

    An index of `num_experts` or more is no expert and is left out.
    """
    order = index_TK.flatten().argsort(stable=True)
    counts = torch.bincount(index_TK.flatten(), minlength=num_experts)[:num_experts].tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, order[start : start + count]
        start += count


def experts_forward(experts: Any, hidden_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """Gated sum [T, H] of the routed experts' outputs; bit-identical from run to run.

    A gate value of exactly zero says that the token skips the expert, whatever its index says (so in ZAYA).
    """
    observer: Observer | None = getattr(experts, "observer", None)
    top_k = index_TK.shape[1]
    slots = hidden_TH.new_zeros(index_TK.numel(), hidden_TH.shape[1])
    num_experts = experts.num_experts if hasattr(experts, "expert_weight") else len(experts.down_proj)
    index_TK = index_TK.masked_fill(gate_TK == 0, num_experts)
    for expert, slot_N in routed_tokens(index_TK, num_experts):
        token_N = slot_N // top_k
        output_NH = expert_output(experts, expert, hidden_TH[token_N])
        gate_N = gate_TK.flatten()[slot_N]
        if observer is not None:
            observer.expert(expert, token_N, gate_N, output_NH)
        slots[slot_N] = output_NH * gate_N[:, None].to(output_NH.dtype)
    routed_TH = slots.view(*index_TK.shape, -1).sum(dim=1)
    if observer is not None:
        observer.block(index_TK, routed_TH)
    return routed_TH


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
