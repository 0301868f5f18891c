"""Each layer's threshold from how gate ratios are distributed: numbers in, numbers out, no torch.

A ratio is a gate value over the largest of its token. They are counted in bins of equal width, so thresholds are
multiples of that width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_compress.calibrate.scores import RATIO_BINS, LayerScores, Scores
from moe_compress.compress.skip.config import SkipConfig
from moe_compress.errors import UsageError

FORMAT = 1
Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerSkip:
    """One MoE layer: its threshold, and the share of its slots that this would skip of the tokens counted."""

    layer: int
    num_experts: int
    top_k: int
    threshold: float
    predicted_skip: float | None  # None where nothing was counted


@dataclass(frozen=True)
class SkipPlan:
    """What the step does to every MoE layer."""

    config: SkipConfig
    layers: tuple[LayerSkip, ...]

    @property
    def predicted_skip(self) -> float | None:
        """Share of all slots that would be skipped of the tokens counted; None where nothing was counted."""
        skipped = [layer.predicted_skip * layer.top_k for layer in self.layers if layer.predicted_skip is not None]
        return sum(skipped) / sum(layer.top_k for layer in self.layers) if skipped else None

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able values; `summary` is for the reader."""
        return {
            "format": FORMAT,
            "op": "skip",
            "summary": self._summary(),
            "config": self.config.model_dump(mode="json"),
            "predicted_skip": self.predicted_skip,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def _summary(self) -> list[str]:
        config = self.config
        low, high = (pick(layer.threshold for layer in self.layers) for pick in (min, max))
        span = f"{low:.4g}" if low == high else f"from {low:.4g} to {high:.4g}"
        lines = [
            f"experts whose gate value is below {span} times the token's largest do not run"
            f"{', gate values are scaled up for it' if config.renormalise else ''}."
        ]
        if config.protect:
            lines.append(f"{config.protect:.1%} of a prompt's tokens are protected.")
        if self.predicted_skip is not None:
            shares = [layer.predicted_skip for layer in self.layers if layer.predicted_skip is not None]
            lines.append(
                f"Predicted: {self.predicted_skip:.1%} of the slots are skipped, {min(shares):.1%} to "
                f"{max(shares):.1%} in a layer."
            )
        return lines


def plan_skip(config: SkipConfig, scores: Scores | None, layers: Sequence[tuple[int, int, int]]) -> SkipPlan:
    """Choose the threshold of every layer; `layers` are (layer, routed experts, experts that the router picks).

    `target_skip` is met as nearly as the bins allow. `scores` are needed unless a threshold is given. Raises
    `UsageError` when the scores know nothing of gate ratios, when there is but one slot, or when `target_skip` asks to
    skip more than all slots but the largest.
    """
    if all(top_k < 2 for _, _, top_k in layers):
        raise UsageError("`skip` compares the experts of a token, and this model uses one per token.")
    ratios = None if scores is None else [_ratios(layer) for layer in scores.layers]
    if isinstance(config.threshold, float):
        thresholds = [config.threshold] * len(layers)
    else:
        assert ratios is not None, "measured before"
        if config.threshold == "median":
            thresholds = [_quantile(layer.second, layer.second.sum() / 2) for layer in ratios]
        else:
            thresholds = _for_target(config, ratios)
    skips = [None] * len(layers) if ratios is None else list(map(_skipped, ratios, thresholds))
    chosen = zip(layers, thresholds, skips, strict=True)
    return SkipPlan(config, tuple(LayerSkip(*layer, threshold, skip) for layer, threshold, skip in chosen))


@dataclass(frozen=True)
class GateRatios:
    """Counted in one layer: tokens, slots per token, and the slots in each bin of ratios, [BINS] each.

    `others` are all slots but each token's largest, `second` the second largest of each token.
    """

    tokens: int
    top_k: int
    others: Array
    second: Array


def _ratios(scores: LayerScores) -> GateRatios:
    table = scores.tables.get("gate_ratios")
    if table is None:
        raise UsageError("the scores know nothing of gate ratios, as an earlier version measured them; score again.")
    return GateRatios(scores.num_tokens, scores.top_k, table[0], table[1])


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


def _skipped(ratios: GateRatios, threshold: float) -> float:
    """Share of the slots whose ratio is below a threshold."""
    return float(ratios.others[: round(threshold * RATIO_BINS)].sum() / (ratios.tokens * ratios.top_k))


def _quantile(counts: Array, below: float) -> float:
    """The ratio below which the number of counted ones is nearest to `below`."""
    cumulated = np.concatenate([[0.0], counts.cumsum()])
    return float(np.abs(cumulated - below).argmin() / RATIO_BINS)
