"""Which layers share a bank, and which of their experts share a place in it: no torch, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.compress.quantize.plan import ExpertShapes
from moe_compress.compress.tie.config import TieConfig
from moe_compress.errors import DataError, UsageError

FORMAT = 1


@dataclass(frozen=True)
class TiedLayer:
    """A layer of a group: the place of each of its experts in the bank, and how much each counts there."""

    layer: int
    slots: tuple[int, ...]
    weights: tuple[float, ...]  # by expert; those of one place sum to 1 over the group's layers


@dataclass(frozen=True)
class TiedGroup:
    """Layers that share a bank; the first one stores it. `ranks` are those of differences, by projection."""

    num_experts: int
    layers: tuple[TiedLayer, ...]
    ranks: dict[str, int] = field(default_factory=dict)

    @property
    def leader(self) -> int:
        """The layer that stores the bank."""
        return self.layers[0].layer


@dataclass(frozen=True)
class TiePlan:
    """What a tie step does; layers in no group are left alone."""

    config: TieConfig
    groups: tuple[TiedGroup, ...]
    num_layers: int

    @property
    def group_of(self) -> dict[int, TiedGroup]:
        """The group of each layer that is in one."""
        return {tied.layer: group for group in self.groups for tied in group.layers}

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able values; `summary` is for the reader."""
        return {
            "format": FORMAT,
            "op": "tie",
            "summary": self._summary(),
            "config": self.config.model_dump(mode="json"),
            "groups": [asdict(group) for group in self.groups],
            "maps": [self._map()],
        }

    def _map(self) -> dict[str, Any]:
        """Where each expert is, for the page of the report."""
        values = {tied.layer: list(tied.slots) for group in self.groups for tied in group.layers}
        note = "Which expert of the group's first layer each expert is tied to."
        return {"title": "Place in the bank", "note": note, "provenance": "decided", "values": values}

    def _summary(self) -> list[str]:
        tied = len(self.group_of)
        names = ", ".join("+".join(str(one.layer) for one in group.layers) for group in self.groups)
        lines = [
            f"{tied} of {self.num_layers} MoE layers share {len(self.groups)} banks (layers {names}); each keeps its "
            "router."
        ]
        if self.config.residual_rank:
            lines.append(f"Each layer keeps a difference of rank {self.config.residual_rank} for each expert's matrix.")
        return lines


def group_layers(config: TieConfig, shapes: Sequence[ExpertShapes]) -> list[list[int]]:
    """The MoE layers of each group: consecutive ones of equal shapes, but for the prelude and the coda.

    A group that would be larger than what is left of equal shapes is smaller; single layers stay alone. Raises
    `UsageError` when there is no group at all.
    """
    free = list(shapes[config.prelude : len(shapes) - config.coda])
    groups: list[list[ExpertShapes]] = []
    for shape in free:
        last = groups[-1] if groups else []
        if last and len(last) < config.group_size and _alike(last[0], shape):
            last.append(shape)
        else:
            groups.append([shape])
    found = [[shape.layer for shape in group] for group in groups if len(group) > 1]
    if not found:
        raise UsageError(
            f"prelude: {config.prelude} and coda: {config.coda} leave {len(free)} of {len(shapes)} MoE layers, and no "
            "two neighbours of equal shapes among them; lower prelude or coda."
        )
    return found


def plan_tie(config: TieConfig, scores: Scores, shapes: Sequence[ExpertShapes]) -> TiePlan:
    """Match the experts of every group's layers.

    Raises `UsageError` when nothing can be tied or the scores lack the costs of matching, `DataError` when costs are
    not finite.
    """
    measured = {layer.layer: layer for layer in scores.layers}
    shape_of = {shape.layer: shape for shape in shapes}
    groups = []
    for layers in group_layers(config, shapes):
        num_experts = shape_of[layers[0]].num_experts
        slots = {layers[0]: np.arange(num_experts)}
        for follower in layers[1:]:
            slots[follower] = _match(config, measured[follower], layers[0], num_experts)
        tokens = {layer: measured[layer].statistics["tokens"] + 1e-9 for layer in layers}
        total = np.zeros(num_experts)
        for layer in layers:
            np.add.at(total, slots[layer], tokens[layer])
        tied = tuple(
            TiedLayer(layer, tuple(slots[layer].tolist()), tuple((tokens[layer] / total[slots[layer]]).tolist()))
            for layer in layers
        )
        ranks = {}
        if config.residual_rank:
            matrices = shape_of[layers[0]].matrices
            largest = min(min(matrix) for matrix in matrices.values())
            ranks = dict.fromkeys(matrices, min(config.residual_rank, largest))
        groups.append(TiedGroup(num_experts, tied, ranks))
    return TiePlan(config, tuple(groups), len(shapes))


def cost_name(leader: int) -> str:
    """The statistic [E, E] of a follower: what it costs that each of its experts takes the place of the leader's."""
    return f"tie.{leader}"


def stored_bytes(plan: TiePlan, shapes: Sequence[ExpertShapes]) -> int:
    """Bytes of the routed experts of all layers, each bank once, with differences and all routers."""
    total = 0
    for shape in shapes:
        group = plan.group_of.get(shape.layer)
        experts = shape.num_experts * (shape.weights * shape.weight_bytes + shape.bias_bytes)
        if group is None or group.leader == shape.layer:
            total += experts
        total += shape.num_experts * (shape.other_bytes - shape.bias_bytes)
        if group is not None and group.ranks:
            sides = sum(group.ranks[part] * sum(sizes) + 1 for part, sizes in shape.matrices.items())
            total += shape.num_experts * (shape.weight_bytes * sides + shape.bias_bytes)
    return total


def _alike(one: ExpertShapes, other: ExpertShapes) -> bool:
    return one.num_experts == other.num_experts and one.projections == other.projections


def _match(config: TieConfig, follower: LayerScores, leader: int, num_experts: int) -> Any:
    """The place in the bank of each of a follower's experts, int [E]."""
    if config.match is False:
        return np.arange(num_experts)
    costs = follower.statistics.get(cost_name(leader))
    if costs is None:
        raise UsageError(f"the scores hold no costs of tying layer {follower.layer} to {leader}; score again.")
    if not np.isfinite(costs).all():
        raise DataError(f"the costs of tying layer {follower.layer} are not finite; its weights are damaged.")
    rows, columns = linear_sum_assignment(costs)
    assert (rows == np.arange(num_experts)).all()
    return columns
