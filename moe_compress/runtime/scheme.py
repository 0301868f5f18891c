"""How one weight matrix is stored in few bits: the names, shapes and types of its tensors, and the way back to numbers.

A scheme is written into `config.json` as `{"bits": 3, "group_size": 64, "symmetric": true}` or `{"format": "nf4"}`.
Integer codes are packed as compressed-tensors packs them (`pack-quantized`), the formats of bitsandbytes as it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from moe_compress.runtime import bnb
from moe_compress.runtime.grid import Grid
from moe_compress.runtime.pack import dequantize_packed

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Scheme:
    """A grid of integers, or a format of bitsandbytes."""

    grid: Grid | None = None
    format: bnb.Kind | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Scheme:
        if "format" in content:
            return cls(format=content["format"])
        return cls(Grid(content["bits"], content["group_size"], content["symmetric"]))

    def to_json(self) -> dict[str, Any]:
        if self.grid is None:
            return {"format": self.format}
        return {"bits": self.grid.bits, "group_size": self.grid.group_size, "symmetric": self.grid.symmetric}

    def tensors(self, height: int, width: int, scale_dtype: torch.dtype) -> Shapes:
        """Name, shape and dtype of what is stored for a matrix [height, width]."""
        if self.grid is None:
            assert self.format is not None
            return bnb.tensors(self.format, height, width)
        groups = self.grid.num_groups(width)
        found: Shapes = {
            "weight_packed": ((height, ceil(width * self.grid.bits / 32)), torch.int32),
            "weight_scale": ((height, groups), scale_dtype),
        }
        if not self.grid.symmetric:
            found["weight_zero_point"] = ((ceil(height * self.grid.bits / 32), groups), torch.int32)
        return found

    def stored_bytes(self, height: int, width: int, scale_dtype: torch.dtype) -> int:
        """Bytes of all of them."""
        found = self.tensors(height, width, scale_dtype).values()
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in found)

    def dequantize(self, tensors: Mapping[str, Tensor], height: int, width: int, dtype: torch.dtype) -> Tensor:
        """The matrix [height, width]."""
        if self.grid is None:
            assert self.format is not None
            return bnb.dequantize(tensors, self.format, (height, width), dtype)
        return dequantize_packed({**tensors, "weight_shape": torch.tensor([height, width])}, self.grid, dtype)
