"""What training adds to the loss so that routers use their zero experts, and the wanted share of them.

`group_balance_loss` is that of ZEDA (arXiv 2605.18643): it balances routed experts and zero experts as two groups, and
leaves the balance inside each alone. `GlobalBalance` is the balance of single experts (arXiv 2501.11873), counted over
the whole batch of a step and over all processes; adapting a trained model is better without it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

ALPHA = 0.1  # of arXiv 2605.18643


def group_balance_loss(
    probability_TR: Tensor, zero_R: Tensor, skipped_TK: Tensor, weight: float, alpha: float = ALPHA
) -> Tensor:
    """The group balance loss of one layer, a scalar: `alpha` where the wanted share of slots is skipped.

    `probability_TR` are the router's scores of all rows as shares of 1, which carry the gradient; `zero_R` says which
    rows are zero experts; `skipped_TK` which slots took one. With N routed and Z zero experts, f the slots per token
    that a group takes and P its mean probability:

        alpha * (N + w Z) / K * (f_E P_E / N + f_Z P_Z / (w Z))
    """
    tokens, top_k = skipped_TK.shape
    num_zero = int(zero_R.sum())
    num_experts = len(zero_R) - num_zero
    f_zero = skipped_TK.sum().to(probability_TR.dtype) / tokens
    p_zero = probability_TR[:, zero_R].sum(dim=1).mean()
    p_experts = probability_TR[:, ~zero_R].sum(dim=1).mean()
    balance = (top_k - f_zero) * p_experts / num_experts + f_zero * p_zero / (weight * num_zero)
    return alpha * (num_experts + weight * num_zero) / top_k * balance


class GlobalBalance:
    """The balance of all rows of a router over the whole batch of an optimiser's step; one for each layer.

    loss = R * sum over rows of f_r p_r: f_r the share of all slots so far in this step that took row r, on all
    processes, p_r the mean probability of row r in this micro-batch. 1 where everything is balanced.
    """

    def __init__(self) -> None:
        self._counts_R: Tensor | None = None

    def loss(self, probability_TR: Tensor, row_TK: Tensor) -> Tensor:
        """Of one micro-batch, a scalar; adds its slots to those of the step."""
        counts_R = torch.bincount(row_TK.flatten(), minlength=probability_TR.shape[1]).to(probability_TR.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts_R)
        self._counts_R = counts_R if self._counts_R is None else self._counts_R + counts_R
        share_R = self._counts_R / self._counts_R.sum()
        return len(share_R) * (share_R * probability_TR.mean(dim=0)).sum()

    def step(self) -> None:
        """Forget the slots, after an optimiser's step."""
        self._counts_R = None
