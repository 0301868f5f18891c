"""How much each token counts when the expert of a bank is fitted.

A few tokens (those that attention sinks rest on) give outputs whose squares outweigh all the rest together. They
matter, but a fit that is left to them forgets the others: half of the weight goes by the size of the error, half by its
size relative to the token's own output.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(output_NH: Tensor) -> Tensor:
    """Weights [N] of tokens with these gated outputs: (1 / mean |y|^2 + 1 / (|y|^2 + median |y|^2))^(1/2).

    1 for tokens that give nothing, all of them.
    """
    squares_N = output_NH.square().sum(1)
    if not squares_N.any():
        return torch.ones_like(squares_N)
    return (1 / squares_N.mean() + 1 / (squares_N + squares_N.median())).sqrt()
