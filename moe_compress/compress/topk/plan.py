"""How many experts per token each layer uses: numbers in, numbers out, no torch.

The program over layers is that of Alloc-MoE (arXiv 2604.08133): with S[i, k] what it costs that layer i uses k experts,
find the k of all layers that sum to no more than a budget and cost least. It is exact, in O(L B K) steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.compress.topk.config import TopkConfig
from moe_compress.errors import DataError, UsageError

FORMAT = 1
PERPLEXITY = "topk_perplexity"  # the table of scores that holds a layer's perplexities
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
        """The plan as JSON-able values; `summary` is for the reader."""
        counts = [layer.k for layer in self.layers]
        shown = str(counts[0]) if len(set(counts)) == 1 else "by layer " + " ".join(map(str, counts))
        over = self.config.normalise_over
        whose = {"picked": "the experts that the model itself picks", "kept": "the experts that run"}.get(
            str(over), f"the best {over}"
        )
        return {
            "format": FORMAT,
            "op": "topk",
            "summary": [
                f"experts per token: {shown}, {self.achieved:.4g} on average; asked: {self.asked:.4g}.",
                f"Gate values are shares of {whose}; {self.skipped:.1%} of the slots no longer run.",
            ],
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
    scores: Scores | None = None,
    *,
    divides: bool = True,
    fixed: bool = False,
) -> TopkPlan:
    """Choose the experts per token of every layer.

    `layers` are (layer, routed experts, experts that the router picks). `allocation: per_layer` needs scores, with the
    perplexities of each layer with 1, 2, ... experts up to its own number. `divides` says whether the family's router
    divides the gate values by their sum, `fixed` whether it can only pick its own number. Raises `UsageError` when `k`
    or `normalise_over` is impossible or without effect, `DataError` on perplexities that are not finite.
    """
    budgets = [_asked(config, picked) for _, _, picked in layers]
    for (layer, num_experts, picked), k in zip(layers, budgets, strict=True):
        if k > picked:
            raise UsageError(f"k: {k} is more than the {picked} experts per token of layer {layer}; lower it.")
        _require_possible(config, k, num_experts, divides)
    costs = None
    chosen = budgets
    if config.allocation == "per_layer":
        assert scores is not None, "measured before"
        costs = [layer_costs(layer) for layer in scores.layers]
        chosen = allocate(costs, _budget(config, layers))
        for (_, num_experts, _), k in zip(layers, chosen, strict=True):
            _require_possible(config, k, num_experts, divides)
    planned = tuple(
        LayerTopk(layer, num_experts, picked, k, _picked(config, picked, k))
        for (layer, num_experts, picked), k in zip(layers, chosen, strict=True)
    )
    _require_effect(planned)
    if fixed and any(layer.picked != layer.picked_before for layer in planned):
        raise UsageError(
            f"this model's routers can only pick {layers[0][2]} experts, so `normalise_over` has to be `picked`."
        )
    return TopkPlan(config, planned, None if costs is None else tuple(tuple(row.tolist()) for row in costs))


def layer_costs(scores: LayerScores) -> Array:
    """What it costs that a layer uses 1, 2, ... experts: how much the perplexity is above that with all, as a share."""
    values = scores.tables.get(PERPLEXITY)
    if values is None:
        raise UsageError("the scores do not say what fewer experts cost in each layer; score again with this recipe.")
    if not np.isfinite(values).all():
        raise DataError(
            f"the perplexities measured for layer {scores.layer} are not finite; the checkpoint is damaged, download "
            "it again."
        )
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


def _budget(config: TopkConfig, layers: Sequence[tuple[int, int, int]]) -> int:
    """Experts per token over all layers."""
    if isinstance(config.k, int):
        return config.k * len(layers)
    return max(len(layers), math.floor(config.k * sum(picked for _, _, picked in layers) + 0.5))


def _require_effect(planned: Sequence[LayerTopk]) -> None:
    if all(layer.k == layer.picked == layer.picked_before for layer in planned):
        raise UsageError(f"k: every token uses {planned[0].k} experts per layer already, so the step has no effect.")


def _require_possible(config: TopkConfig, k: int, num_experts: int, divides: bool) -> None:
    over = config.normalise_over
    if not isinstance(over, int):
        return
    if not divides:
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
