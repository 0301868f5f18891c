"""Which layers share a bank, and which of their experts share a place in it: no torch, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.compress.allocate import solve
from moe_compress.compress.allocate_problem import Budget, Item, Option, Rules
from moe_compress.compress.quantize.plan import ExpertShapes
from moe_compress.compress.tie.config import TieConfig
from moe_compress.errors import DataError, UsageError

FORMAT = 1
KEEP = "keep"  # a group that is not tied


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
    allocation: dict[str, Any] | None = None  # how the groups were chosen

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
            "allocation": self.allocation,
            "maps": self._maps(),
        }

    def _maps(self) -> list[dict[str, Any]]:
        """Whether each expert is tied, and to which, for the page of the report."""
        places = {tied.layer: list(tied.slots) for group in self.groups for tied in group.layers}
        roles = {layer: [int(layer != group.leader)] * group.num_experts for layer, group in self.group_of.items()}
        labels = ["stored in this layer", "tied to the group's first layer"]
        note = "Experts of layers that share a bank; all others are by themselves."
        tied = {"title": "Tied", "note": note, "values": roles, "labels": labels}
        place = {"title": "Expert of the bank", "values": places, "drawn": False}
        return [entry | {"provenance": "decided"} for entry in (tied, place)]

    def _summary(self) -> list[str]:
        tied = len(self.group_of)
        names = ", ".join("+".join(str(one.layer) for one in group.layers) for group in self.groups)
        lines = [
            f"{tied} of {self.num_layers} MoE layers share {len(self.groups)} banks (layers {names}); each keeps its "
            "router."
        ]
        ranks = [next(iter(group.ranks.values()), 0) for group in self.groups]
        if any(ranks):
            shown = str(ranks[0]) if len(set(ranks)) == 1 else ", ".join(map(str, ranks)) + ", by group,"
            lines.append(f"Each layer keeps a difference of rank {shown} for each expert's matrix.")
        if self.allocation is not None:
            proof = "proven optimal" if self.allocation["optimal"] else "not proven optimal"
            lines.append(f"Chosen by {self.allocation['solver']} ({proof}): loss {self.allocation['loss']:.6g}.")
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


def plan_tie(config: TieConfig, scores: Scores, shapes: Sequence[ExpertShapes], total_bytes: int = 0) -> TiePlan:
    """Match the experts of every group's layers and, with `choose: auto`, choose the groups.

    `total_bytes` is what the checkpoint holds as it is. Raises `UsageError` when nothing can be tied, the scores lack
    costs, or the budget cannot be met, `DataError` when costs are not finite.
    """
    groups = matched_groups(config, scores, shapes)
    if config.choose == "all":
        return TiePlan(config, tuple(groups), len(shapes))
    return _chosen(config, scores, shapes, groups, total_bytes)


def matched_groups(config: TieConfig, scores: Scores, shapes: Sequence[ExpertShapes]) -> list[TiedGroup]:
    """All groups that are possible, their experts matched."""
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
        groups.append(TiedGroup(num_experts, tied, ranks_of(shape_of[layers[0]], config.residual_rank)))
    return groups


def ranks_of(shape: ExpertShapes, rank: int) -> dict[str, int]:
    """The rank of differences by projection, no larger than a matrix; empty for rank 0."""
    largest = min(min(matrix) for matrix in shape.matrices.values())
    return dict.fromkeys(shape.matrices, min(rank, largest)) if rank else {}


def _chosen(
    config: TieConfig, scores: Scores, shapes: Sequence[ExpertShapes], groups: list[TiedGroup], total_bytes: int
) -> TiePlan:
    """The groups that are worth tying, each with its rank, by the allocation program."""
    measured = {layer.layer: layer for layer in scores.layers}
    shape_of = {shape.layer: shape for shape in shapes}
    items, offered = [], {}
    for group in groups:
        own = [shape_of[tied.layer] for tied in group.layers]
        alone = stored_bytes(TiePlan(config, (), len(own)), own)
        options = [Option(KEEP, 0.0, alone, 0.0, 0.0)]
        for rank in dict.fromkeys(config.rank_options):
            ranked = replace(group, ranks=ranks_of(own[0], rank))
            losses = measured[group.leader].statistics.get(loss_name(rank))
            if losses is None:
                raise UsageError(f"the scores hold no losses of tying with rank {rank}; score again with this recipe.")
            nbytes = stored_bytes(TiePlan(config, (ranked,), len(own)), own)
            options.append(Option(str(rank), 0.0, nbytes, 0.0, float(losses.sum())))
            offered[group.leader, str(rank)] = ranked
        items.append(Item(f"layer {group.leader}", group.leader, 1, tuple(options)))
    rest = total_bytes - sum(item.options[0].stored_bytes for item in items)
    items.append(Item("everything else", None, 1, (Option(KEEP, 0.0, rest, 0.0, 0.0),)))
    found = solve(items, Budget(stored_bytes=config.stored_bytes), Rules())
    taken = [offered[g.leader, name] for g, name in zip(groups, found.chosen, strict=False) if name != KEEP]
    if not taken:
        raise UsageError(
            f"stored_bytes: {config.stored_bytes:,} is no less than the checkpoint has, so no layer is tied; lower it."
        )
    described = {"loss": found.loss, "relaxation_bound": found.relaxation_bound, "optimal": found.optimal}
    return TiePlan(config, tuple(taken), len(shapes), described | {"solver": found.solver})


def loss_name(rank: int) -> str:
    """The statistic [E] of a leader: the error that its group makes when it is tied with differences of this rank.

    By place in the bank, over the squared norm of the hidden states that leave each layer, summed over the layers.
    """
    return f"tie_loss.{rank}"


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
