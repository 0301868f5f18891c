"""What GPTQ of the model of `gptq_speed` takes at least: its multiplications, at the rate that the machine has for it.

Counted is what no way of doing the same work goes without: one forward pass of the calibration tokens through every
layer's matrices (nothing looks at what the last experts' down projections give), attention to earlier tokens alone,
one half of every symmetric second moment, one factorisation and one inverse per matrix of inputs, and the updates of
the columns. Everything else (choosing scales, rounding, activations, moving tokens to their experts, the disk) is left
out.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from moe_compress.models.linear import BLOCK, linear

REPEATS = 50


def operations(shape: dict[str, Any], num_tokens: int, sequence_length: int) -> dict[str, float]:
    """Floating-point operations of the whole step by kind, two per multiplication and addition."""
    layers, experts, top_k = shape["num_hidden_layers"], shape["num_experts"], shape["num_experts_per_tok"]
    hidden, inner = shape["hidden_size"], shape["moe_intermediate_size"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    joined = queries + 2 * shape["num_key_value_heads"] * shape["head_dim"]  # rows of q, k and v
    routed = num_tokens * top_k
    attention = hidden * (joined + queries)
    forward = layers * (num_tokens * attention + routed * 3 * hidden * inner) - routed * hidden * inner
    scores = layers * num_tokens * sequence_length / 2 * 2 * queries
    moments = layers * (num_tokens * (hidden**2 + queries**2) + routed * (hidden**2 + inner**2)) / 2
    matrices = [(1, joined, hidden), (1, hidden, queries), (experts, 2 * inner, hidden), (experts, hidden, inner)]
    factors = layers * sum(count * width**3 / 3 for count, _, width in matrices)  # a sixth each, and its inverse
    updates = layers * sum(count * rows * width**2 / 2 for count, rows, width in matrices)
    return {
        "forward": 2 * forward,
        "attention": 2 * scores,
        "second_moments": 2 * moments,
        "factors": 2 * factors,
        "updates": 2 * updates,
    }


@torch.no_grad()
def rate() -> float:
    """Floating-point operations per second of the fastest of many products of the experts' sizes, by all threads."""
    inputs, weight = torch.randn(BLOCK, 512), torch.randn(512, 512)
    fastest = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        linear(inputs, weight)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * BLOCK * 512 * 512 / fastest


def floor(shape: dict[str, Any], num_tokens: int, sequence_length: int) -> dict[str, Any]:
    """Operations by kind, the machine's rate, and the seconds that follow."""
    found = operations(shape, num_tokens, sequence_length)
    speed = rate()
    return {
        "gigaflop": {kind: round(count / 1e9, 1) for kind, count in found.items()},
        "gigaflop_per_second": round(speed / 1e9, 1),
        "seconds": round(sum(found.values()) / speed, 2),
    }
