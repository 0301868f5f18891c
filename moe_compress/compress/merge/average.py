"""Averages of experts, neuron by neuron."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_compress.compress.merge.neurons import Expert


def average(experts: Sequence[Expert], weights: Sequence[float]) -> Expert:
    """The weighted mean of experts whose neurons are in the same order; the weights sum to 1."""
    shares = torch.tensor(weights, dtype=torch.float64)
    parts = {
        name: torch.tensordot(shares, torch.stack([expert.parts[name] for expert in experts]).double(), 1).float()
        for name in experts[0].parts
    }
    offsets = [expert.offset for expert in experts if expert.offset is not None]
    offset = torch.tensordot(shares, torch.stack(offsets).double(), 1).float() if offsets else None
    return Expert(parts, offset)
