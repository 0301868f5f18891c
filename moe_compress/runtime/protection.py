"""Tokens of a prompt that skip no expert: those that later tokens look at most (ODP, arXiv 2410.06270).

The importance of token t of L is |h_t|_1 times the attention it receives from itself and later tokens, the mean over
the heads, divided by the L - t tokens that can give any; h is what enters the experts. It needs the attention map of
the same decoder layer, so attention is computed by its plain formula ("eager"). A token that is generated alone is
never protected. Not covered: padded prompts, whose padding counts as tokens.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.errors import UnsupportedModelError


class Protection:
    """Tells the rules of one layer which tokens are protected."""

    def __init__(self, share: float, rules: Any, layer: int) -> None:
        self.share, self.rules, self.layer = share, rules, layer
        self.received_BS: Tensor | None = None

    def attach(self, layer: nn.Module, block: nn.Module, experts: nn.Module) -> None:
        """Watch the attention and the experts of a decoder layer; before its rules are attached."""
        outside = [module for module in layer.modules() if block is layer or module not in set(block.modules())]
        for module in outside:
            if "Attention" in type(module).__name__:
                module.register_forward_hook(self._see_attention)
        experts.register_forward_pre_hook(self._protect, with_kwargs=True)

    def _see_attention(self, module: Any, inputs: Any, output: Any) -> None:
        maps = [item for item in output if isinstance(item, Tensor)] if isinstance(output, tuple) else []
        if len(maps) > 1 and maps[1].ndim == 4:
            self.received_BS = received_attention(maps[1])

    def _protect(self, module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden_TH = (*inputs, *keywords.values())[0]
        received_BS, self.received_BS = self.received_BS, None
        if received_BS is None:
            raise UnsupportedModelError(
                f"Layer {self.layer} has no attention map to choose protected tokens by; leave `protect` out."
            )
        self.rules.protected_T = None
        length = received_BS.shape[1]
        if length > 1:
            importance_BS = hidden_TH.float().abs().sum(dim=-1).view(received_BS.shape) * received_BS
            chosen_BN = importance_BS.topk(ceil(self.share * length), dim=1).indices
            protected_BS = torch.zeros_like(importance_BS, dtype=torch.bool).scatter(1, chosen_BN, True)
            self.rules.protected_T = protected_BS.flatten()


def received_attention(map_BHQK: Tensor) -> Tensor:
    """What each of the Q last tokens receives [B, Q], over the number of tokens that can look at it."""
    queries = map_BHQK.shape[2]
    received_BQ = map_BHQK[..., -queries:].float().mean(dim=1).sum(dim=1)
    return received_BQ / torch.arange(queries, 0, -1, device=received_BQ.device)
