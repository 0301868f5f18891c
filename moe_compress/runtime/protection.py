"""Tokens of a prompt that skip no expert: those that later tokens look at most (ODP, arXiv 2410.06270).

The importance of token t of L is |h_t|_1 times the attention it receives from itself and later tokens, the mean over
the heads, divided by the L - t tokens that can give any; h is what enters the experts. It needs the attention map of
the same decoder layer, so attention is computed by its plain formula ("eager"). A prompt is what goes through in one
piece with nothing before it; later tokens, such as those generated one by one, are not protected. Not covered: padded
prompts, whose padding counts as tokens.
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
        self.map_BHQK: Tensor | None = None
        self.goes_on = False

    def attach(self, layer: nn.Module, block: nn.Module, experts: nn.Module) -> None:
        """Watch the attention and the experts of a decoder layer; before its rules are attached."""
        inside = set() if block is layer else set(block.modules())
        for module in layer.modules():
            if module not in inside and "Attention" in type(module).__name__:
                module.register_forward_hook(self._see_attention, with_kwargs=True)
        experts.register_forward_pre_hook(self._protect, with_kwargs=True)

    def _see_attention(self, module: Any, inputs: Any, keywords: dict[str, Any], output: Any) -> None:
        found = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(found, Tensor) and found.ndim == 4:
            self.map_BHQK = found
            self.goes_on = keywords.get("past_key_values") is not None

    def _protect(self, module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden_TH = (*inputs, *keywords.values())[0]
        map_BHQK, self.map_BHQK, self.rules.protected_T = self.map_BHQK, None, None
        if map_BHQK is not None and map_BHQK.shape[2] == map_BHQK.shape[3] and self._fits(map_BHQK, hidden_TH):
            importance_BQ = received_attention(map_BHQK) * hidden_TH.float().abs().sum(dim=-1).view(len(map_BHQK), -1)
            chosen_BN = importance_BQ.topk(ceil(self.share * importance_BQ.shape[1]), dim=1).indices
            protected_BQ = torch.zeros_like(importance_BQ, dtype=torch.bool).scatter(1, chosen_BN, True)
            if map_BHQK.shape[2] > 1:
                self.rules.protected_T = protected_BQ.flatten()
        elif map_BHQK is None or not self.goes_on or not self._fits(map_BHQK, hidden_TH):
            raise UnsupportedModelError(
                f"Layer {self.layer} has no attention map to choose protected tokens by; leave `protect` out."
            )

    @staticmethod
    def _fits(map_BHQK: Tensor, hidden_TH: Tensor) -> bool:
        """Whether there is a row of the map for every token."""
        return map_BHQK.shape[0] * map_BHQK.shape[2] == len(hidden_TH)


def received_attention(map_BHQQ: Tensor) -> Tensor:
    """What each of Q tokens receives [B, Q], over the number of tokens that can look at it."""
    received_BQ = map_BHQQ.float().mean(dim=1).sum(dim=1)
    return received_BQ / torch.arange(map_BHQQ.shape[2], 0, -1, device=received_BQ.device)
