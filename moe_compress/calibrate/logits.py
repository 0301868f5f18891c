"""How alike the experts of a layer are to its router: inner products of their logits over all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_compress.models.layers import MoELayer


class RouterGram:
    """Accumulates sum of l l^T over tokens, l the routed experts' router logits [E], before any normalisation.

    The logits are taken where the router's matrix [E, X] is used: by the module that owns it, on that module's first
    input. A router that computes them elsewhere leaves nothing to see; the inner products of its rows stand for it.
    """

    def __init__(self, moe: MoELayer) -> None:
        self._count = moe.num_experts
        name, self._owner = _matrix(moe)
        self._weight: Tensor | None = self._owner.get_parameter(name) if self._owner is not None else None
        self._sum: Tensor | None = None
        self._hook = None if self._owner is None else self._owner.register_forward_pre_hook(self._see)

    def close(self) -> Tensor:
        """Stop looking; float64 [E, E]."""
        if self._hook is not None:
            self._hook.remove()
        if self._sum is not None:
            return self._sum
        if self._weight is None:
            return torch.zeros(self._count, self._count, dtype=torch.float64)
        rows = self._weight[: self._count].double()
        return rows @ rows.T

    def _see(self, module: Any, inputs: Any) -> None:
        assert self._weight is not None
        hidden = inputs[0].flatten(0, -2)
        if hidden.shape[1] != self._weight.shape[1]:
            return
        bias = getattr(module, "bias", None)
        logits = hidden.float() @ self._weight[: self._count].float().T
        if isinstance(bias, Tensor) and bias.shape == self._weight.shape[:1]:
            logits = logits + bias[: self._count].float()
        gram = logits.double().T @ logits.double()
        self._sum = gram if self._sum is None else self._sum + gram


def _matrix(moe: MoELayer) -> tuple[str, Any]:
    """The router's matrix by its name in the module that owns it, and that module; None where there is none."""
    for name, (tensor, dimension) in moe.router_tensors().items():
        if dimension == 0 and tensor.ndim == 2 and tensor.shape[1] > 1:
            path, _, leaf = name.rpartition(".")
            return leaf, moe.block.get_submodule(path)
    return "", None
