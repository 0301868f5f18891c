"""Which experts of each layer are put together, which of them leads, and how much each counts: no torch, no weights.

The dominant expert of a group lends it its router row (`router: reduce`), the order of its neurons, and with
`keep_differences` its weights. It is the most frequently used member with `grouping: router` and with
`keep_differences`, else the most salient one. Super experts (arXiv 2507.23279) are groups of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.compress.merge import grouping
from moe_compress.compress.merge.config import MergeConfig
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.compress.prune.plan import criterion_scores, keep_count, super_experts
from moe_compress.compress.quantize.plan import ExpertShapes
from moe_compress.errors import UsageError
from moe_compress.text import listed

FORMAT = 1
MAX_LISTED = 20
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Experts that are put together: `members` ascending, the dominant one among them, and shares that sum to 1."""

    dominant: int
    members: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class MergedLayer:
    """One MoE layer: its groups by ascending dominant expert; `ranks` are those of differences."""

    layer: int
    num_experts: int
    groups: tuple[Group, ...]
    scores: tuple[float, ...]
    protected: tuple[int, ...]
    ranks: dict[str, int] = field(default_factory=dict)  # by projection, the same for all members

    @property
    def slots(self) -> tuple[int, ...]:
        """The group of each expert."""
        found = {expert: slot for slot, group in enumerate(self.groups) for expert in group.members}
        return tuple(found[expert] for expert in range(self.num_experts))

    @property
    def dominants(self) -> tuple[int, ...]:
        """The dominant expert of each group, ascending."""
        return tuple(group.dominant for group in self.groups)

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values; `groups` are the members of each, `dominants` and `weights` beside them."""
        return {
            "layer": self.layer,
            "num_experts": self.num_experts,
            "groups": [list(group.members) for group in self.groups],
            "dominants": list(self.dominants),
            "weights": [list(group.weights) for group in self.groups],
            "scores": list(self.scores),
            "protected": list(self.protected),
            "ranks": self.ranks,
        }


@dataclass(frozen=True)
class MergePlan:
    """What a merge step does to every MoE layer."""

    config: MergeConfig
    layers: tuple[MergedLayer, ...]

    @property
    def num_experts(self) -> int:
        """Experts of all layers before merging."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def num_groups(self) -> int:
        """Groups of all layers."""
        return sum(len(layer.groups) for layer in self.layers)

    @property
    def num_asked(self) -> float:
        """Groups of all layers that `keep` asked for, before any rounding."""
        keep = self.config.keep
        return float(keep * len(self.layers) if isinstance(keep, int) else keep * self.num_experts)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able values; `summary` is for the reader."""
        return {
            "format": FORMAT,
            "op": "merge",
            "summary": self._summary(),
            "config": self.config.model_dump(mode="json"),
            "layers": [layer.to_json() for layer in self.layers],
            "maps": [self._map()],
        }

    def _map(self) -> dict[str, Any]:
        """Whom each expert follows, for the page of the report."""
        values = {layer.layer: [layer.dominants[slot] for slot in layer.slots] for layer in self.layers}
        return {"title": "Dominant expert of its group", "provenance": "decided", "values": values, "drawn": False}

    def _summary(self) -> list[str]:
        config = self.config
        sizes = [len(group.members) for layer in self.layers for group in layer.groups]
        what = "share one" if config.keep_differences is None else "are kept as differences from one"
        lines = [
            f"grouping {config.grouping}: the {self.num_experts} experts of {len(self.layers)} layers fall into "
            f"{self.num_groups} groups of 1 to {max(sizes)}; the members of a group {what}.",
            "The router keeps its rows." if config.keeps_router else "Each group has one row of the router.",
        ]
        ranks = sorted({rank for layer in self.layers for rank in layer.ranks.values()})
        if ranks:
            lines.append(f"Differences have rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}.")
        protected = [f"layer {layer.layer} expert {expert}" for layer in self.layers for expert in layer.protected]
        if protected:
            lines.append(f"Super experts by themselves: {listed(protected, MAX_LISTED)}.")
        return lines


def group_count(config: MergeConfig, *, num_experts: int, top_k: int, num_groups: int = 1, **limits: Any) -> int:
    """Groups that one layer is left with; `UsageError` when that cannot be. The limits are those of `keep_count`.

    With `router: reduce` they are the experts that the router chooses from, else any number from one on will do.
    """
    asked = PruneConfig(op="prune", criterion="reap", keep=config.keep, multiple_of=config.multiple_of)
    if config.keeps_router:
        count = keep_count(asked, num_experts=num_experts, top_k=1)
    else:
        count = keep_count(asked, num_experts=num_experts, top_k=top_k, num_groups=num_groups, **limits)
    if config.grouping == "ream" and count * config.max_group_size < num_experts:
        raise UsageError(
            f"max_group_size: {count} groups of {config.max_group_size} do not hold {num_experts} experts; raise it "
            "or keep."
        )
    return count


def plan_merge(
    config: MergeConfig,
    scores: Scores,
    shapes: Sequence[ExpertShapes],
    *,
    num_decoder_layers: int,
    num_groups: int = 1,
    groups_per_token: int | None = None,
) -> MergePlan:
    """Choose the groups of every layer.

    `num_groups` and `groups_per_token` are the router's, as for pruning: with `router: reduce` experts are only put
    together with others of the same routing group, equally many in each. Raises `UsageError` for a `keep` that cannot
    be, or scores that lack what the grouping needs, `DataError` for statistics that are not finite.
    """
    found = super_experts(scores, num_decoder_layers) if config.protect_super_experts else set()
    layers = []
    for layer, shape in zip(scores.layers, shapes, strict=True):
        count = group_count(
            config,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            num_groups=num_groups,
            groups_per_token=groups_per_token,
        )
        protected = tuple(sorted(expert for index, expert in found if index == layer.layer))
        saliency = criterion_scores(PruneConfig(op="prune", criterion=config.criterion, keep=1.0), layer)
        regions = num_groups if not config.keeps_router else 1
        size = layer.num_experts // regions
        groups: list[Group] = []
        for region in range(regions):
            experts = list(range(region * size, (region + 1) * size))
            groups += _groups(config, layer, saliency, experts, set(protected), count // regions)
        groups.sort(key=lambda group: group.dominant)
        ranks = difference_ranks(config, shape, len(groups))
        layers.append(
            MergedLayer(layer.layer, layer.num_experts, tuple(groups), tuple(saliency.tolist()), protected, ranks)
        )
    return MergePlan(config, tuple(layers))


def stored_bytes(plan: MergePlan, shapes: Sequence[ExpertShapes]) -> int:
    """Bytes of the routed experts of all layers, of their differences, and of the router rows that count them."""
    total = 0
    for layer, shape in zip(plan.layers, shapes, strict=True):
        groups, rows = len(layer.groups), shape.num_experts if plan.config.keeps_router else len(layer.groups)
        total += groups * (shape.weights * shape.weight_bytes + shape.bias_bytes) + rows * (
            shape.other_bytes - shape.bias_bytes
        )
        for rank in set(layer.ranks.values()):
            total += difference_bytes(shape, groups, rank) + shape.num_experts * shape.bias_bytes
    return total


def difference_bytes(shape: ExpertShapes, num_groups: int, rank: int) -> int:
    """Stored bytes of one layer's differences: factors of the members that lead no group, scales of all, biases."""
    members, matrices = shape.num_experts - num_groups, shape.matrices
    sides = sum(rows + columns for rows, columns in matrices.values())
    return shape.weight_bytes * (members * rank * sides + shape.num_experts * len(matrices))


def difference_ranks(config: MergeConfig, shape: ExpertShapes, num_groups: int) -> dict[str, int]:
    """The rank of every difference of one layer, by projection; empty where none are kept.

    Raises `UsageError` when the bytes that are asked for leave no room.
    """
    if config.keep_differences is None:
        return {}
    matrices = shape.matrices
    largest = min(min(matrix) for matrix in matrices.values())
    members, rank = shape.num_experts - num_groups, config.keep_differences.rank
    if rank is None:
        assert config.keep_differences.expert_bytes is not None
        whole = shape.weights * shape.weight_bytes
        room = config.keep_differences.expert_bytes * shape.num_experts * whole - num_groups * whole
        each = difference_bytes(shape, num_groups, 1) - difference_bytes(shape, num_groups, 0)
        rank = int((room - difference_bytes(shape, num_groups, 0)) // each) if members else 0
        if members and rank < 1:
            raise UsageError(
                f"expert_bytes: {config.keep_differences.expert_bytes} leaves no room for differences beside "
                f"{num_groups} whole experts of {shape.num_experts} in layer {shape.layer}; lower keep."
            )
    return dict.fromkeys(matrices, min(rank, largest))


def _groups(
    config: MergeConfig, layer: LayerScores, saliency: Array, experts: list[int], protected: set[int], count: int
) -> list[Group]:
    """The groups of some experts of a layer, `count` of them."""
    alone = [expert for expert in experts if expert in protected]
    others = np.array([expert for expert in experts if expert not in protected], dtype=np.intp)
    left = count - len(alone)
    if left < (1 if len(others) else 0):
        raise UsageError(
            f"keep: {config.keep} leaves layer {layer.layer} no group beside those of its super experts, which stay "
            f"alone (super experts: {len(alone)}, groups: {count}); raise keep, or set protect_super_experts: false."
        )
    found = [Group(expert, (expert,), (1.0,)) for expert in alone]
    if not len(others):
        return found
    frequency = layer.statistics["tokens"]
    labels = _labels(config, layer, saliency, frequency, others, left)
    leads = frequency if config.grouping == "router" or config.keep_differences is not None else saliency
    weights = {"frequency": frequency, "saliency": saliency, "uniform": np.ones_like(frequency)}[config.weighting]
    for inside in grouping.members(labels):
        members = others[inside]
        total = weights[members].sum()
        shares = weights[members] / total if total > 0 else np.full(len(members), 1 / len(members))
        dominant = int(members[np.argmax(leads[members])])
        found.append(Group(dominant, tuple(members.tolist()), tuple(shares.tolist())))
    return found


def _labels(
    config: MergeConfig, layer: LayerScores, saliency: Array, frequency: Array, experts: NDArray[np.intp], count: int
) -> NDArray[np.intp]:
    """The group of each of these experts."""
    router = _statistic(layer, "router_gram")[np.ix_(experts, experts)]
    if config.grouping == "router":
        return grouping.by_router(grouping.cosines(router), frequency[experts], count)
    if config.grouping == "hc":
        return grouping.hierarchical(_statistic(layer, "mean_output")[experts], count)
    outputs = _statistic(layer, "gated_output_sum")[experts]
    distance = grouping.joint_distance(outputs @ outputs.T, router)
    if config.max_group_size * count < len(experts):
        raise UsageError(
            f"max_group_size: {count} groups of {config.max_group_size} do not hold the {len(experts)} experts of "
            f"layer {layer.layer} that are no super experts; raise it or keep."
        )
    return grouping.around_centroids(distance, saliency[experts], count, config.max_group_size)


def _statistic(layer: LayerScores, name: str) -> Array:
    if name not in layer.statistics:
        raise UsageError(f"the scores hold no `{name}`, which this grouping needs; score again with this recipe.")
    return layer.statistics[name]
