"""How many experts per token each layer uses: numbers in, numbers out, no torch.

The program over layers is that of Alloc-MoE (arXiv 2604.08133): with S[i, k] what it costs that layer i uses k experts,
find the k of all layers that sum to no more than a budget and cost least. It is exact, in O(L B K) steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_compress.compress.topk.config import TopkConfig
from moe_compress.errors import DataError, UsageError

FORMAT = 1
Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerTopk:
    """One MoE layer: its router's own top-k, the experts that will run, and how many the router will pick for that."""

    layer: int
    num_experts: int
    picked_before: int
    k: int
    picked: int


@dataclass(frozen=True)
class TopkPlan:
    """What the step does to every MoE layer; `costs` are those of arXiv 2604.08133 by layer, where measured."""

    config: TopkConfig
    layers: tuple[LayerTopk, ...]
    costs: tuple[tuple[float, ...], ...] | None = None

    @property
    def skipped(self) -> float:
        """Share of the slots that no longer run."""
        return 1 - sum(layer.k for layer in self.layers) / sum(layer.picked_before for layer in self.layers)

    @property
    def asked(self) -> float:
        """Experts per token and layer that were asked for, on average."""
        return self.config.k if isinstance(self.config.k, int) else self.config.k * _mean(self.layers, "picked_before")

    @property
    def achieved(self) -> float:
        """Experts per token and layer, on average."""
        return _mean(self.layers, "k")

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able values."""
        return {
            "format": FORMAT,
            "config": self.config.model_dump(mode="json"),
            "asked": self.asked,
            "achieved": self.achieved,
            "skipped": self.skipped,
            "layers": [asdict(layer) for layer in self.layers],
            "costs": self.costs,
        }


def plan_topk(
    config: TopkConfig,
    layers: Sequence[tuple[int, int, int]],
    perplexities: Mapping[int, Sequence[float]] | None = None,
    *,
    normalises: bool = True,
) -> TopkPlan:
    """Choose the experts per token of every layer.

    `layers` are (layer, routed experts, experts that the router picks). `perplexities` are needed by `allocation:
    per_layer`: of each layer those measured with 1, 2, ... experts up to the layer's own number. `normalises` says
    whether the family's router divides the gate values by their sum. Raises `UsageError` when `k` or `normalise_over`
    is impossible or without effect, `DataError` on perplexities that are not finite.
    """
    budgets = [_asked(config, picked) for _, _, picked in layers]
    for (layer, num_experts, picked), k in zip(layers, budgets, strict=True):
        if k > picked:
            raise UsageError(f"k: {k} is more than the {picked} experts per token of layer {layer}; lower it.")
        _require_possible(config, k, num_experts, normalises)
    costs = None
    chosen = budgets
    if config.allocation == "per_layer":
        assert perplexities is not None, "measured before"
        costs = [layer_costs(perplexities[layer], layer) for layer, _, _ in layers]
        chosen = allocate(costs, sum(budgets))
        for (_, num_experts, _), k in zip(layers, chosen, strict=True):
            _require_possible(config, k, num_experts, normalises)
    planned = tuple(
        LayerTopk(layer, num_experts, picked, k, _picked(config, picked, k))
        for (layer, num_experts, picked), k in zip(layers, chosen, strict=True)
    )
    return TopkPlan(config, planned, None if costs is None else tuple(tuple(row.tolist()) for row in costs))


def layer_costs(perplexities: Sequence[float], layer: int) -> Array:
    """What it costs that a layer uses 1, 2, ... experts: how much the perplexity is above that with all, as a share."""
    values = np.asarray(perplexities, dtype=np.float64)
    if not np.isfinite(values).all() or not (values > 0).all():
        raise DataError(f"the perplexities measured for layer {layer} are not finite; is the checkpoint damaged?")
    costs: Array = values / values[-1] - 1
    return costs


def allocate(costs: Sequence[Array], budget: int) -> list[int]:
    """The experts per token of each layer, at least 1, that sum to at most `budget` at the least total cost.

    `costs[i][k - 1]` is what layer i costs with k. Of equal totals, the smaller sum is taken. Raises `UsageError` when
    there are more layers than experts to spend.
    """
    if budget < len(costs):
        raise UsageError(f"{budget} experts per token over {len(costs)} layers leave some without any; raise k.")
    best = np.full(budget + 1, np.inf)  # by the sum spent so far
    best[0] = 0.0
    choices = np.zeros((len(costs), budget + 1), dtype=np.intp)
    for index, row in enumerate(costs):
        before, best = best, np.full(budget + 1, np.inf)
        for k in range(1, min(len(row), budget) + 1):
            total = before[: budget + 1 - k] + row[k - 1]
            better = total < best[k:]
            best[k:][better] = total[better]
            choices[index, k:][better] = k
    spent = int(np.argmin(best))
    chosen: list[int] = []
    for index in reversed(range(len(costs))):
        chosen.append(int(choices[index, spent]))
        spent -= chosen[-1]
    return chosen[::-1]


def _asked(config: TopkConfig, picked: int) -> int:
    """A fraction to the nearest count, halves up, at least 1."""
    return config.k if isinstance(config.k, int) else max(1, math.floor(config.k * picked + 0.5))


def _picked(config: TopkConfig, own: int, k: int) -> int:
    if isinstance(config.normalise_over, int):
        return config.normalise_over
    return k if config.normalise_over == "kept" else own


def _require_possible(config: TopkConfig, k: int, num_experts: int, normalises: bool) -> None:
    over = config.normalise_over
    if not isinstance(over, int):
        return
    if not normalises:
        raise UsageError(
            f"normalise_over: {over} has no effect: this model's routers do not divide gate values by their sum."
        )
    if not k <= over <= num_experts:
        raise UsageError(
            f"normalise_over: {over} is impossible with {k} experts per token of {num_experts}; give a number between "
            "these."
        )


def _mean(layers: Sequence[LayerTopk], name: str) -> float:
    return float(sum(getattr(layer, name) for layer in layers) / len(layers))
