"""What training adds to the loss so that routers use their zero experts, and the wanted share of them.

`group_balance_loss` is that of ZEDA (arXiv 2605.18643): it balances routed experts and zero experts as two groups, and
leaves the balance inside each alone. `expert_balance_loss` is that of single experts, counted over the whole batch of
an update (arXiv 2501.11873); ZEDA adapts trained models without one, and one inside small batches cost it much.
"""

from __future__ import annotations

import torch
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


def expert_balance_loss(probability_TR: Tensor, share_R: Tensor, zero_R: Tensor, weight: float) -> Tensor:
    """The balance of single experts in one layer, a scalar: 1 where each takes its part of the slots.

    `share_R` is the share of all slots that each row of the router took, counted over the whole batch of an update, and
    carries no gradient; `probability_TR` may be of a part of its tokens, for the loss is linear in it. With p the mean
    probability of a row, the loss of arXiv 2501.11873 where a zero expert is to take `weight` times the slots of a
    routed one, as in `group_balance_loss`:

        (N + w Z) * (sum of share p over routed experts + sum of share p over zero experts / w)
    """
    num_zero = int(zero_R.sum())
    wanted_R = torch.where(zero_R, weight, 1.0).to(probability_TR.dtype)
    product_R = share_R.to(probability_TR.dtype) * probability_TR.mean(dim=0) / wanted_R
    return (len(zero_R) - num_zero + weight * num_zero) * product_R.sum()
