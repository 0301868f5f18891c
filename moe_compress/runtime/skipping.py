"""Runs the experts of a layer where not every slot runs: a skipped slot costs no row of any product.

The slots that run are sorted by expert and gathered once; each projection is one grouped product over them, and one
fused gather, weighting and sum gives every token its output. Registered with transformers under the name `SKIPPING`, so
that any model can use it: `experts_implementation="moe_compress_skipping"`.

Not covered: expert parallelism, graphs captured on a GPU (the number of slots that run is read back once per call).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from moe_compress.models.experts import IMPLEMENTATION, experts_forward

SKIPPING = "moe_compress_skipping"


class SkippingExperts(nn.Module):
    """Mixed into a family's experts class whose slots may be skipped, whatever implementation the model names."""

    routing_rules: Any
    config: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The gated sum of the experts' outputs over the slots that run."""
        if self.config._experts_implementation == IMPLEMENTATION:
            return experts_forward(self, hidden_states, top_k_index, top_k_weights)
        if not self.routing_rules.skips:
            routed: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return routed
        return skipping_forward(self, hidden_states, top_k_index, top_k_weights)


def skipping_forward(experts: Any, hidden_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """Gated sum [T, H] over the slots with a gate value other than 0 and an index below the number of experts."""
    num_experts = len(experts.down_proj)
    runs_TK = (index_TK < num_experts) & (gate_TK != 0)
    expert_S = index_TK.masked_fill(~runs_TK, num_experts).flatten()
    order_S = expert_S.argsort(stable=True)
    offsets_E = torch.bincount(expert_S, minlength=num_experts)[:num_experts].cumsum(0, dtype=torch.int32)
    slot_M = order_S[: int(offsets_E[-1])]
    if not len(slot_M):
        return torch.zeros_like(hidden_TH)
    rows_MH = hidden_TH[slot_M // index_TK.shape[1]]
    output_MH = _expert_rows(experts, rows_MH, expert_S[slot_M], offsets_E)
    return _combined(output_MH, slot_M, runs_TK, gate_TK).to(hidden_TH.dtype)


def _expert_rows(experts: Any, rows_MH: Tensor, expert_M: Tensor, offsets_E: Tensor) -> Tensor:
    """Raw outputs [M, H] of rows that are sorted by expert; `offsets_E` says where each expert's rows end."""

    def linear(rows: Tensor, name: str) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[expert_M] if experts.has_bias else None
        product: Tensor = _grouped_linear(
            rows, getattr(experts, name), offsets_E, bias=bias, is_transposed=experts.is_transposed
        )
        return product

    if experts.has_gate:
        inner = experts._apply_gate(linear(rows_MH, "gate_up_proj"))
    else:
        inner = experts.act_fn(linear(rows_MH, "up_proj"))
    output = linear(inner, "down_proj")
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output


def _combined(output_MH: Tensor, slot_M: Tensor, runs_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """Each token's sum [T, H] of its slots' outputs times their gate values."""
    if output_MH.requires_grad or gate_TK.requires_grad:
        weighted_MH = output_MH * gate_TK.flatten()[slot_M, None].to(output_MH.dtype)
        zeros = output_MH.new_zeros(len(gate_TK), output_MH.shape[1])
        return zeros.index_add(0, slot_M // gate_TK.shape[1], weighted_MH)
    row_S = torch.empty(gate_TK.numel(), dtype=slot_M.dtype, device=slot_M.device)
    row_S[slot_M] = torch.arange(len(slot_M), device=slot_M.device)
    runs_S, count_T = runs_TK.flatten(), runs_TK.sum(dim=1)
    gate_M = gate_TK.flatten()[runs_S].to(output_MH.dtype)
    start_T = count_T.cumsum(0) - count_T
    return F.embedding_bag(row_S[runs_S], output_MH, start_T, mode="sum", per_sample_weights=gate_M)


ALL_EXPERTS_FUNCTIONS.register(SKIPPING, skipping_forward)
