"""How much each token counts when an expert is fitted: those with extreme outputs no more than others.

A few tokens (those that attention sinks rest on) give outputs whose squares outweigh all the rest together. The norms
that follow make them small again, so what matters of them is their error relative to their size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(output_NH: Tensor) -> Tensor:
    """Weights [N] of tokens with these gated outputs: (1 + |y|^2 / median |y|^2)^(-1/2), 1 to 0."""
    squares_N = output_NH.square().sum(1)
    if not len(squares_N):
        return squares_N
    return (1 + squares_N / squares_N.median().clamp(min=torch.finfo(torch.float32).tiny)).rsqrt()
