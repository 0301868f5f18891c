"""Each layer's threshold from how gate ratios are distributed: numbers in, numbers out, no torch.

A ratio is a gate value over the largest of its token. They are counted in bins of width 1 / `BINS` (of all slots but
the largest, and of the second largest alone), so thresholds are multiples of that width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_compress.compress.skip.config import SkipConfig
from moe_compress.errors import UsageError

FORMAT = 1
BINS = 4096
Array = NDArray[np.float64]


@dataclass(frozen=True)
class GateRatios:
    """Counted in one MoE layer: tokens, slots per token, and the slots in each bin of ratios, [BINS] each.

    `others` are all slots but each token's largest, `second` the second largest of each token.
    """

    layer: int
    num_experts: int
    top_k: int
    tokens: int
    others: Array
    second: Array


@dataclass(frozen=True)
class LayerSkip:
    """One MoE layer: its threshold, and the share of its slots that this would skip of the tokens counted."""

    layer: int
    num_experts: int
    top_k: int
    threshold: float
    predicted_skip: float


@dataclass(frozen=True)
class SkipPlan:
    """What the step does to every MoE layer."""

    config: SkipConfig
    layers: tuple[LayerSkip, ...]

    @property
    def predicted_skip(self) -> float:
        """Share of all slots that would be skipped of the tokens counted."""
        return sum(layer.predicted_skip * layer.top_k for layer in self.layers) / sum(
            layer.top_k for layer in self.layers
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able values."""
        return {
            "format": FORMAT,
            "config": self.config.model_dump(mode="json"),
            "predicted_skip": self.predicted_skip,
            "layers": [asdict(layer) for layer in self.layers],
        }


def plan_skip(config: SkipConfig, ratios: Sequence[GateRatios]) -> SkipPlan:
    """Choose the threshold of every layer.

    `target_skip` is met as nearly as the bins allow. Raises `UsageError` when it asks to skip more than all slots but
    the largest, or when there is but one slot.
    """
    if all(layer.top_k < 2 for layer in ratios):
        raise UsageError("`skip` compares the experts of a token, and this model uses one per token.")
    if isinstance(config.threshold, float):
        thresholds = [config.threshold] * len(ratios)
    elif config.threshold == "median":
        thresholds = [_quantile(layer.second, layer.second.sum() / 2) for layer in ratios]
    else:
        thresholds = _for_target(config, ratios)
    layers = []
    for layer, threshold in zip(ratios, thresholds, strict=True):
        slots = layer.tokens * layer.top_k
        skipped = layer.others[: round(threshold * BINS)].sum() / slots if slots else 0.0
        layers.append(LayerSkip(layer.layer, layer.num_experts, layer.top_k, threshold, float(skipped)))
    return SkipPlan(config, tuple(layers))


def _for_target(config: SkipConfig, ratios: Sequence[GateRatios]) -> list[float]:
    target = config.target_skip
    assert target is not None
    groups = [[layer] for layer in ratios] if config.scope == "layer" else [list(ratios)]
    thresholds: list[float] = []
    for group in groups:
        slots = sum(layer.tokens * layer.top_k for layer in group)
        most = 1 - sum(layer.tokens for layer in group) / slots
        if target > most:
            raise UsageError(
                f"target_skip: {target} is more than can be skipped, as every token keeps its largest expert; the most "
                f"is {most:.4g}."
            )
        others = np.sum([layer.others for layer in group], axis=0)
        thresholds += [_quantile(others, target * slots)] * len(group)
    return thresholds


def _quantile(counts: Array, below: float) -> float:
    """The ratio below which the number of counted ones is nearest to `below`."""
    cumulated = np.concatenate([[0.0], counts.cumsum()])
    return float(np.abs(cumulated - below).argmin() / BINS)
