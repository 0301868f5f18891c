"""How many experts each layer uses: the dynamic program against every combination, and what is refused."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import numpy as np
import pytest

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.compress.topk.config import TopkConfig
from moe_compress.compress.topk.plan import PERPLEXITY, allocate, layer_costs, plan_topk
from moe_compress.errors import DataError, UsageError

LAYERS = [(1, 16, 4), (2, 16, 4), (5, 16, 4)]


def config(**settings: Any) -> TopkConfig:
    return TopkConfig.model_validate({"op": "topk"} | settings)


def scores(*perplexities: list[float]) -> Scores:
    layers = [
        LayerScores(layer, experts, picked, 10, 0.0, {}, tables={PERPLEXITY: np.array(values)})
        for (layer, experts, picked), values in zip(LAYERS, perplexities, strict=True)
    ]
    return Scores(layers, {})


# -------------------------------------------------------------------------------------------------------------- program


def cheapest(costs: list[np.ndarray], budget: int) -> float:
    """The least total cost of all combinations with at least one expert each."""
    options = [range(1, len(row) + 1) for row in costs]
    return min(
        sum(row[k - 1] for row, k in zip(costs, chosen, strict=True))
        for chosen in product(*options)
        if sum(chosen) <= budget
    )


@pytest.mark.parametrize("seed", range(30))
def test_program_finds_the_cheapest_of_all_combinations(seed: int) -> None:
    """Also where costs rise and fall, and layers have different numbers."""
    rng = np.random.default_rng(seed)
    costs = [rng.normal(size=rng.integers(1, 6)) for _ in range(5)]
    if seed % 2:
        costs = [np.sort(row)[::-1] for row in costs]
    for budget in range(5, sum(map(len, costs)) + 3):
        chosen = allocate(costs, budget)
        assert all(1 <= k <= len(row) for row, k in zip(costs, chosen, strict=True)) and sum(chosen) <= budget
        total = sum(row[k - 1] for row, k in zip(costs, chosen, strict=True))
        assert total == pytest.approx(cheapest(costs, budget), abs=1e-12)


def test_of_equal_costs_the_fewest_experts_are_used() -> None:
    assert allocate([np.zeros(4), np.zeros(4)], 8) == [1, 1]


def test_less_than_one_expert_per_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="2 experts per token over 3 layers"):
        allocate([np.zeros(2)] * 3, 2)


def test_costs_are_what_the_perplexity_rises_by() -> None:
    (layer, *_) = scores([12.0, 11.0, 10.5, 10.0], [1, 1, 1, 1], [1, 1, 1, 1]).layers
    np.testing.assert_allclose(layer_costs(layer), [0.2, 0.1, 0.05, 0.0])


# ----------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize(("k", "expected"), [(0.5, 2), (0.6, 2), (0.63, 3), (0.1, 1), (2, 2), (1, 1), (0.25, 1)])
def test_uniform(k: float, expected: int) -> None:
    plan = plan_topk(config(k=k), LAYERS)
    assert [(layer.layer, layer.k, layer.picked) for layer in plan.layers] == [(n, expected, 4) for n in (1, 2, 5)]
    assert plan.achieved == expected and plan.skipped == 1 - expected / 4
    assert plan.asked == (k if isinstance(k, int) else 4 * k)
    json.dumps(plan.to_json())


@pytest.mark.parametrize(("over", "picked"), [("picked", 4), ("kept", 2), (8, 8), (2, 2), (16, 16)])
def test_whose_gate_values_count(over: Any, picked: int) -> None:
    plan = plan_topk(config(k=2, normalise_over=over), LAYERS)
    assert {layer.picked for layer in plan.layers} == {picked}


def test_per_layer_spends_the_same_sum_where_it_matters() -> None:
    measured = scores([10.0, 10.0, 10.0, 10.0], [90.0, 40.0, 20.0, 10.0], [11.0, 10.1, 10.0, 10.0])
    plan = plan_topk(config(k=0.5, allocation="per_layer"), LAYERS, measured)
    assert [layer.k for layer in plan.layers] == [1, 4, 1] and plan.achieved == 2
    kept = plan_topk(config(k=2, allocation="per_layer", normalise_over="kept"), LAYERS, measured)
    assert [(layer.k, layer.picked) for layer in kept.layers] == [(1, 1), (4, 4), (1, 1)]
    assert json.loads(json.dumps(plan.to_json()))["costs"][1][0] == 8.0


def test_what_is_impossible_is_refused() -> None:
    with pytest.raises(UsageError, match="k: 5 is more than the 4 experts per token of layer 1"):
        plan_topk(config(k=5), LAYERS)
    with pytest.raises(UsageError, match="normalise_over: 17 is impossible with 2 experts per token of 16"):
        plan_topk(config(k=2, normalise_over=17), LAYERS)
    with pytest.raises(UsageError, match="normalise_over: 1 is impossible"):
        plan_topk(config(k=2, normalise_over=1), LAYERS)
    with pytest.raises(UsageError, match="can only pick 4 experts"):
        plan_topk(config(k=2, normalise_over="kept"), LAYERS, fixed=True)
    assert plan_topk(config(k=2), LAYERS, fixed=True).achieved == 2


def test_what_has_no_effect_is_refused() -> None:
    with pytest.raises(UsageError, match="normalise_over: 8 has no effect"):
        plan_topk(config(k=2, normalise_over=8), LAYERS, divides=False)
    for over in ("picked", "kept", 4):
        with pytest.raises(UsageError, match="so the step has no effect"):
            plan_topk(config(k=4, normalise_over=over), LAYERS)
    assert plan_topk(config(k=4, normalise_over=8), LAYERS).skipped == 0


def test_scores_without_a_profile_and_damaged_ones() -> None:
    bare = Scores([LayerScores(1, 16, 4, 10, 0.0, {})], {})
    with pytest.raises(UsageError, match="score again"):
        plan_topk(config(k=2, allocation="per_layer"), LAYERS[:1], bare)
    with pytest.raises(DataError, match="layer 2 are not finite"):
        plan_topk(config(k=2, allocation="per_layer"), LAYERS, scores([1, 1, 1, 1], [np.inf, 1, 1, 1], [1, 1, 1, 1]))


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 1.5}, {"k": True}, {"k": "half"}, {"k": 2, "normalise_over": "all"}])
def test_wrong_settings_are_one_sentence(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="should be") as caught:
        config(**wrong)
    assert len(caught.value.errors()) == 1  # type: ignore[attr-defined]
