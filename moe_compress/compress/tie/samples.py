"""What comes to the experts of a layer: a sample of each expert's inputs and gate values, kept on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_compress.checkpoint.durable import replace_durably
from moe_compress.compress.sampling import EvenSample
from moe_compress.models.layers import MoELayer


@dataclass(frozen=True)
class Sample:
    """Of one expert: inputs [N, H] and gate values [N], float32."""

    input_NH: Tensor
    gate_N: Tensor


class ExpertSamples:
    """A `Measurement` that keeps up to `limit` tokens of each expert, evenly spaced, in `folder`."""

    def __init__(self, moe: MoELayer, folder: Path, limit: int) -> None:
        self.moe, self.folder = moe, folder
        self._samples = [EvenSample(limit) for _ in range(moe.num_experts)]

    def add(self, expert: int, input_NH: Tensor, block_input_NH: Tensor, gate_N: Tensor, leaving_N: Tensor) -> None:
        self._samples[expert].add(input_NH.float(), gate_N.float())

    def measure(self) -> dict[str, NDArray[np.float64]]:
        """No statistics; writes the file."""
        kept: dict[str, Tensor] = {}
        for expert, sample in enumerate(self._samples):
            if sample.kept:
                kept[f"{expert}.input"], kept[f"{expert}.gate"] = (rows.cpu().contiguous() for rows in sample.kept)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = sample_file(self.folder, self.moe.layer)
        save_file(kept, file.with_suffix(".part"))
        replace_durably(file.with_suffix(".part"), file)
        return {}


def sample_file(folder: Path, layer: int) -> Path:
    """Where a layer's samples are."""
    return folder / f"layer-{layer:05d}.safetensors"


def load_samples(folder: Path, layer: int, num_experts: int, width: int) -> list[Sample]:
    """The samples of every expert of a layer; empty ones for experts that no token reached."""
    kept = load_file(sample_file(folder, layer))
    empty = torch.empty(0, width), torch.empty(0)
    return [
        Sample(kept.get(f"{expert}.input", empty[0]), kept.get(f"{expert}.gate", empty[1]))
        for expert in range(num_experts)
    ]
