"""Plans of tying: which layers, which experts, how much each counts, and the bytes; all from made-up numbers."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import numpy as np
import pytest

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.compress.quantize.plan import ExpertShapes
from moe_compress.compress.tie.config import TieConfig
from moe_compress.compress.tie.plan import cost_name, group_layers, loss_name, plan_tie, stored_bytes
from moe_compress.errors import DataError, RecipeError, UsageError
from moe_compress.recipe import load_recipe
from moe_compress.report.experts import expert_maps

EXPERTS = 5
WEIGHTS = 3 * 16 * 24


def shape(layer: int, width: int = 16) -> ExpertShapes:
    sizes = {"gate_proj": (width, 24), "up_proj": (width, 24), "down_proj": (24, width)}
    return ExpertShapes(layer, EXPERTS, 2, sizes, 2, 48)


def config(**settings: Any) -> TieConfig:
    return TieConfig.model_validate({"op": "tie", "prelude": 1, "coda": 1} | settings)


def scores(layers: list[int], seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    made = []
    for layer in layers:
        statistics = {"tokens": rng.integers(1, 50, EXPERTS).astype(float)}
        statistics |= {cost_name(leader): rng.random((EXPERTS, EXPERTS)) for leader in layers if leader < layer}
        made.append(LayerScores(layer, EXPERTS, 2, 100, 0.9, statistics))
    return Scores(made, {})


@pytest.mark.parametrize(
    ("settings", "widths", "expected"),
    [
        ({}, [16] * 8, [[1, 2], [3, 4], [5, 6]]),
        ({"group_size": 4, "coda": 0}, [16] * 8, [[1, 2, 3, 4], [5, 6, 7]]),
        ({"prelude": 0, "coda": 0, "group_size": 3}, [16] * 7, [[0, 1, 2], [3, 4, 5]]),
        ({"prelude": 0, "coda": 0}, [16, 16, 16, 32, 32, 16, 16], [[0, 1], [3, 4], [5, 6]]),
        ({"prelude": 2, "coda": 2}, [16] * 6, [[2, 3]]),
    ],
)
def test_groups_of_neighbours(settings: dict[str, Any], widths: list[int], expected: list[list[int]]) -> None:
    shapes = [shape(layer, width) for layer, width in enumerate(widths)]
    assert group_layers(config(**settings), shapes) == expected


@pytest.mark.parametrize(("prelude", "widths"), [(2, [16] * 4), (9, [16] * 4), (0, [16, 32, 16])])
def test_nothing_to_tie(prelude: int, widths: list[int]) -> None:
    with pytest.raises(UsageError, match="lower prelude or coda"):
        group_layers(config(prelude=prelude), [shape(layer, width) for layer, width in enumerate(widths)])


def test_experts_are_matched_at_the_least_cost() -> None:
    measured = scores([0, 1, 2, 3, 4], seed=3)
    plan = plan_tie(config(group_size=3), measured, [shape(layer) for layer in range(5)])
    (group,) = plan.groups
    assert [tied.layer for tied in group.layers] == [1, 2, 3] and group.leader == 1
    assert group.layers[0].slots == tuple(range(EXPERTS))
    roles, places = expert_maps([plan.to_json()], [])
    assert roles.texts[1] == ["stored in this layer"] * EXPERTS and roles.drawn and not places.drawn
    assert all(roles.texts[layer] == ["tied to the group's first layer"] * EXPERTS for layer in (2, 3))
    for tied in group.layers[1:]:
        assert places.values[tied.layer] == list(tied.slots)
        costs = measured.layers[tied.layer].statistics[cost_name(1)]

        def total(slots: Any, costs: Any = costs) -> float:
            return float(costs[range(EXPERTS), list(slots)].sum())

        assert tied.slots == min(permutations(range(EXPERTS)), key=total)


def test_members_count_by_their_tokens() -> None:
    measured = scores([0, 1, 2, 3], seed=1)
    (group,) = plan_tie(config(), measured, [shape(layer) for layer in range(4)]).groups
    for slot in range(EXPERTS):
        experts = [tied.slots.index(slot) for tied in group.layers]
        tokens = [measured.layers[t.layer].statistics["tokens"][e] for t, e in zip(group.layers, experts, strict=True)]
        weights = [tied.weights[expert] for tied, expert in zip(group.layers, experts, strict=True)]
        assert weights == pytest.approx(np.array(tokens) / sum(tokens))


def test_without_matching_numbers_decide() -> None:
    plan = plan_tie(config(match=False), scores([0, 1, 2, 3]), [shape(layer) for layer in range(4)])
    assert all(tied.slots == tuple(range(EXPERTS)) for tied in plan.groups[0].layers)


@pytest.mark.parametrize("rank", [0, 3, 100])
def test_bytes(rank: int) -> None:
    plan = plan_tie(config(residual_rank=rank), scores(list(range(6))), [shape(layer) for layer in range(6)])
    banks = 4 * EXPERTS * WEIGHTS * 2  # of layers 0, 1 (for 2 too), 3 (for 4 too) and 5
    rank = min(rank, 16)
    own = EXPERTS * 3 * (rank * 40 + 1) * 2 if rank else 0
    assert stored_bytes(plan, [shape(layer) for layer in range(6)]) == banks + 4 * own + 6 * EXPERTS * 48


def test_scores_without_costs_and_damaged_ones() -> None:
    measured, shapes = scores([0, 1, 2, 3]), [shape(layer) for layer in range(4)]
    measured.layers[2].statistics[cost_name(1)][0, 0] = np.nan
    with pytest.raises(DataError, match="layer 2 are not finite"):
        plan_tie(config(), measured, shapes)
    del measured.layers[2].statistics[cost_name(1)]
    with pytest.raises(UsageError, match="tying layer 2 to 1; score again"):
        plan_tie(config(), measured, shapes)


def chosen(budget: int, losses: dict[int, dict[int, float]]) -> Any:
    """A plan of three pairs of layers, for a checkpoint that holds nothing but experts and their routers."""
    measured, shapes = scores(list(range(6))), [shape(layer) for layer in range(6)]
    for leader, found in losses.items():
        for rank, loss in found.items():
            measured.layers[leader].statistics[loss_name(rank)] = np.full(EXPERTS, loss / EXPERTS)
    options = list(next(iter(losses.values())))
    asked = config(prelude=0, coda=0, choose="auto", stored_bytes=budget, rank_options=options)
    return plan_tie(asked, measured, shapes, 6 * EXPERTS * (WEIGHTS * 2 + 48))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
def test_the_choice_is_the_best_of_all(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    losses = {leader: {0: rng.random() + 1, 2: rng.random(), 5: rng.random() / 2} for leader in (0, 2, 4)}
    whole, pair, routers = 6 * EXPERTS * WEIGHTS * 2, EXPERTS * WEIGHTS * 2, 6 * EXPERTS * 48
    budget = int(share * (whole + routers))

    def saved(rank: int | None) -> int:
        own = 2 * EXPERTS * 3 * (rank * 40 + 1) * 2 if rank else 0
        return 0 if rank is None else pair - own

    possible = []
    for ranks in product([None, 0, 2, 5], repeat=3):
        if whole + routers - sum(map(saved, ranks)) <= budget:
            possible.append((sum(losses[2 * g][r] for g, r in enumerate(ranks) if r is not None), ranks))
    loss, best = min(possible, key=lambda found: found[0])
    plan = chosen(budget, losses)
    found = {group.leader: next(iter(group.ranks.values()), 0) for group in plan.groups}
    assert found == {2 * g: rank for g, rank in enumerate(best) if rank is not None}
    assert plan.allocation["loss"] == pytest.approx(loss) and plan.allocation["optimal"]
    assert stored_bytes(plan, [shape(layer) for layer in range(6)]) <= budget


def test_choices_that_cannot_be() -> None:
    losses = {leader: {0: 1.0} for leader in (0, 2, 4)}
    with pytest.raises(UsageError, match="no layer is tied; lower it"):
        chosen(10**9, losses)
    with pytest.raises(UsageError, match="stored_bytes"):
        chosen(1000, losses)
    with pytest.raises(UsageError, match="no losses of tying with rank 3"):
        measured = scores(list(range(6)))
        asked = config(choose="auto", stored_bytes=10, rank_options=[3])
        plan_tie(asked, measured, [shape(layer) for layer in range(6)], 100)


RECIPE: dict[str, Any] = {"model": "reference", "calibration": {"dataset": "reference"}}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"fit": "average", "fit_steps": 5}, "fit_steps"),
        ({"stored_bytes": "1GB"}, "stored_bytes"),
        ({"rank_options": [1]}, "rank_options"),
        ({"choose": "auto", "stored_bytes": "1GB", "residual_rank": 4}, "residual_rank"),
    ],
)
def test_settings_without_effect(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError, match=rf"steps\.0\.{key}.*no effect"):
        load_recipe(RECIPE | {"steps": [{"op": "tie"} | settings]})


def test_a_choice_needs_a_size() -> None:
    with pytest.raises(RecipeError, match="choose: auto needs `stored_bytes`"):
        load_recipe(RECIPE | {"steps": [{"op": "tie", "choose": "auto"}]})


def test_only_quantization_follows() -> None:
    tie, merge = {"op": "tie"}, {"op": "merge", "grouping": "hc", "keep": 8}
    given = RECIPE | {"export": {"tier": "plugin"}}
    with pytest.raises(RecipeError, match=r"steps\.1\.op.*put it after this one"):
        load_recipe(given | {"steps": [tie, merge]}, runnable=True)
    load_recipe(given | {"steps": [merge, tie, {"op": "quantize", "bits": 4}]}, runnable=True)
