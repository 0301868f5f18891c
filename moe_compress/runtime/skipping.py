"""Runs the experts of a layer where not every slot runs: a skipped slot costs no row of any product.

The slots that run are sorted by expert and gathered once; each projection is one grouped product over them, and one
fused gather, weighting and sum gives every token its output. Registered with transformers under the name `SKIPPING`, so
that any model can use it: `experts_implementation="moe_compress_skipping"`.

On processors torch's grouped product is a loop over all experts that calls the BLAS library. Where that is not the
best, each expert that runs has a product of its own: for a single token, whose slots need no sorting and no gathering,
and for large experts in float32, which oneDNN multiplies in about half of the time.

Not covered: expert parallelism, graphs captured on a GPU (the number of slots that run is read back once per call).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_mm

from moe_compress.models.experts import IMPLEMENTATION, experts_forward
from moe_compress.models.linear import linear

SKIPPING = "moe_compress_skipping"
FEW_SLOTS = 512  # up to here, plain additions are faster than a fused sum, which takes some calls to prepare
LARGE_EXPERT = 1 << 20  # numbers in a matrix from which its product takes longer than calling it
Product = Callable[[Tensor, Tensor], Tensor]  # rows [M, I], matrices [E, I, O] -> [M, O]


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
    alone = _multiplies_alone(experts.down_proj)
    if alone and len(hidden_TH) == 1:
        return _one_token(experts, hidden_TH, index_TK[0].tolist(), gate_TK[0].tolist())
    expert_S = index_TK.masked_fill(gate_TK == 0, num_experts).flatten()
    order_S = expert_S.argsort(stable=True)
    count_E = torch.bincount(expert_S, minlength=num_experts)[:num_experts]
    offsets_E = count_E.cumsum(0, dtype=torch.int32)
    slot_M = order_S[: int(offsets_E[-1])]
    if not len(slot_M):
        return torch.zeros_like(hidden_TH)
    token_M = slot_M // index_TK.shape[1]
    product = partial(_grouped_product, offsets_E=offsets_E)
    if alone and experts.down_proj.dtype == torch.float32 and experts.down_proj[0].numel() >= LARGE_EXPERT:
        runs = [(expert, count) for expert, count in enumerate(count_E.tolist()) if count]
        product = partial(_single_products, runs=runs)
    output_MH = _expert_rows(experts, hidden_TH[token_M], expert_S[slot_M], product)
    gate_M = gate_TK.flatten()[slot_M]
    return _combined(output_MH, token_M, gate_M, len(hidden_TH)).to(hidden_TH.dtype)


def _multiplies_alone(weight_E: Tensor) -> bool:
    """Whether products of single experts may be faster than a grouped one: on a processor, where nothing is trained."""
    return weight_E.device.type == "cpu" and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _one_token(experts: Any, hidden_1H: Tensor, index_K: Sequence[int], gate_K: Sequence[float]) -> Tensor:
    """The output [1, H] of a single token."""
    slots = [
        (index, gate) for index, gate in zip(index_K, gate_K, strict=True) if index < len(experts.down_proj) and gate
    ]
    if not slots:
        return torch.zeros_like(hidden_1H)
    expert_M, gate_M = zip(*slots, strict=True)
    product = partial(_single_products, runs=[(expert, 1) for expert in expert_M])
    output_MH = _expert_rows(experts, hidden_1H.expand(len(slots), -1), list(expert_M), product)
    output_MH = output_MH.to(torch.promote_types(output_MH.dtype, torch.float32))
    return (output_MH.new_tensor([gate_M]) @ output_MH).to(hidden_1H.dtype)


def _expert_rows(experts: Any, rows_MH: Tensor, expert_M: Tensor | list[int], product: Product) -> Tensor:
    """Raw outputs [M, H] of rows that are sorted by expert."""

    def projected(rows: Tensor, name: str) -> Tensor:
        weight: Tensor = getattr(experts, name)
        found = product(rows, weight if experts.is_transposed else weight.transpose(1, 2))
        return found + getattr(experts, f"{name}_bias")[expert_M] if experts.has_bias else found

    if experts.has_gate:
        inner = experts._apply_gate(projected(rows_MH, "gate_up_proj"))
    else:
        inner = experts.act_fn(projected(rows_MH, "up_proj"))
    output = projected(inner, "down_proj")
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output


def _single_products(rows: Tensor, weight_EIO: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Rows [M, I] times the matrix of each one's expert, expert by expert; `runs` has experts and numbers of rows."""
    parts = rows.split([count for _, count in runs])
    return torch.cat([linear(part, weight_EIO[expert].T) for part, (expert, _) in zip(parts, runs, strict=True)])


def _grouped_product(rows: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """Rows [M, I] times the matrix of each one's expert; `offsets_E` says where each expert's rows end."""
    if weight_EIO.dtype == torch.float64:  # which torch's grouped product does not know
        product: Tensor = torch.ops.transformers.grouped_mm_fallback(rows, weight_EIO, offs=offsets_E)
        return product
    return _grouped_mm(rows, weight_EIO, offsets_E)


def _combined(output_MH: Tensor, token_M: Tensor, gate_M: Tensor, tokens: int) -> Tensor:
    """Each token's sum [T, H] of its slots' outputs times their gate values; added up in float32 at least."""
    if output_MH.requires_grad or gate_M.requires_grad or len(token_M) <= FEW_SLOTS:
        weighted_MH = output_MH * gate_M[:, None].to(torch.promote_types(gate_M.dtype, torch.float32))
        return weighted_MH.new_zeros(tokens, output_MH.shape[1]).index_add(0, token_M, weighted_MH)
    by_token_M = token_M.argsort()
    count_T = torch.bincount(token_M, minlength=tokens)
    gates = gate_M[by_token_M].to(output_MH.dtype)
    return F.embedding_bag(by_token_M, output_MH, count_T.cumsum(0) - count_T, mode="sum", per_sample_weights=gates)


ALL_EXPERTS_FUNCTIONS.register(SKIPPING, skipping_forward)
