"""A bounded, even sample of rows that pass by."""

from __future__ import annotations

import torch
from torch import Tensor


class EvenSample:
    """Every n-th row; when there are more than `limit` of them, every other one goes and n doubles."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._step, self._passed = 1, 0
        self._kept: list[Tensor] = []

    def add(self, *rows: Tensor) -> None:
        """Look at some rows [N, ...] of each of several tensors that belong together."""
        first = -self._passed % self._step
        taken = [tensor[first :: self._step].clone() for tensor in rows]
        self._kept = [torch.cat(pair) for pair in zip(self._kept, taken, strict=True)] if self._kept else taken
        self._passed += len(rows[0])
        while len(self._kept[0]) > self.limit:
            self._kept = [tensor[::2] for tensor in self._kept]
            self._step *= 2

    @property
    def kept(self) -> list[Tensor]:
        """The sampled rows of each tensor; empty when nothing has passed."""
        return self._kept
