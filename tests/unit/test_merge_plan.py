"""Plans of merging: which expert leads, what members count, ranks and bytes; all from numbers made up here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.compress.merge.config import MergeConfig
from moe_compress.compress.merge.plan import Group, MergePlan, group_count, plan_merge, stored_bytes
from moe_compress.compress.quantize.plan import ExpertShapes
from moe_compress.errors import RecipeError, UsageError
from moe_compress.recipe import load_recipe

EXPERTS, WIDTH = 8, 6
SHAPE = ExpertShapes(0, EXPERTS, 2, {"gate_proj": (16, 24), "up_proj": (16, 24), "down_proj": (24, 16)}, 2, 48)
WEIGHTS = 3 * 16 * 24  # of one expert


def statistics(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(10, 100, EXPERTS).astype(float)
    logits = rng.normal(size=(50, EXPERTS))
    return {
        "tokens": tokens,
        "gate_norm_sum": tokens * rng.random(EXPERTS),
        "max_abs": np.ones(EXPERTS),
        "router_gram": logits.T @ logits,
        "gated_output_sum": rng.normal(size=(EXPERTS, WIDTH)),
        "mean_output": rng.normal(size=(EXPERTS, WIDTH)),
    }


def scores(layers: int = 2, **changed: Any) -> Scores:
    made = [LayerScores(layer, EXPERTS, 2, 500, 0.9, statistics(layer) | changed) for layer in range(layers)]
    return Scores(made, {})


def plan(config: dict[str, Any], found: Scores | None = None, **limits: Any) -> MergePlan:
    found = found or scores()
    settings = MergeConfig.model_validate({"op": "merge", "keep": 4} | config)
    shapes = [SHAPE] * len(found.layers)
    return plan_merge(settings, found, shapes, num_decoder_layers=8, **limits)


@pytest.mark.parametrize("grouping", ["hc", "router", "ream"])
@pytest.mark.parametrize("weighting", ["frequency", "saliency", "uniform"])
def test_groups_share_out_all_experts(grouping: str, weighting: str) -> None:
    found = scores()
    made = plan({"grouping": grouping, "weighting": weighting}, found)
    for layer, measured in zip(made.layers, found.layers, strict=True):
        tokens = measured.statistics["tokens"]
        reap = measured.statistics["gate_norm_sum"] / tokens
        assert len(layer.groups) == 4
        assert sorted(expert for group in layer.groups for expert in group.members) == list(range(EXPERTS))
        assert list(layer.dominants) == sorted(layer.dominants)
        for slot, group in enumerate(layer.groups):
            assert all(layer.slots[expert] == slot for expert in group.members)
            leads = tokens if grouping == "router" else reap
            assert group.dominant == max(group.members, key=lambda expert: leads[expert])
            counts = {"frequency": tokens, "saliency": reap, "uniform": np.ones(EXPERTS)}[weighting]
            members = list(group.members)
            assert group.weights == pytest.approx(counts[members] / counts[members].sum())


def test_members_without_tokens_count_alike() -> None:
    made = plan({"grouping": "router", "router": "keep", "keep": 1}, scores(1, tokens=np.zeros(EXPERTS)))
    assert made.layers[0].groups == (Group(0, tuple(range(EXPERTS)), (1 / EXPERTS,) * EXPERTS),)


def test_super_experts_stay_by_themselves() -> None:
    peaks = np.ones(EXPERTS)
    peaks[5] = 1000
    made = [LayerScores(0, EXPERTS, 2, 500, 0.9, statistics(0) | {"max_abs": peaks})]
    made += [LayerScores(layer, EXPERTS, 2, 500, 0.9, statistics(layer)) for layer in range(1, 8)]
    protected = plan({"grouping": "ream"}, Scores(made, {})).layers[0]
    assert protected.protected == (5,) and Group(5, (5,), (1.0,)) in protected.groups and len(protected.groups) == 4
    free = plan({"grouping": "ream", "protect_super_experts": False}, Scores(made, {})).layers[0]
    assert free.protected == ()


def test_routing_groups_keep_their_experts_when_the_router_shrinks() -> None:
    reduced = plan({"grouping": "hc"}, num_groups=2)
    for layer in reduced.layers:
        sides = [{expert // 4 for expert in group.members} for group in layer.groups]
        assert all(len(side) == 1 for side in sides) and sum(side == {0} for side in sides) == 2
    kept = plan({"grouping": "hc", "router": "keep", "keep": 1}, num_groups=2)
    assert all(len(layer.groups) == 1 for layer in kept.layers)


def test_counts() -> None:
    reduce = MergeConfig(op="merge", grouping="hc", keep=1)
    with pytest.raises(UsageError, match="smallest possible is keep: 2"):
        group_count(reduce, num_experts=8, top_k=2)
    assert group_count(reduce.model_copy(update={"router": "keep"}), num_experts=8, top_k=2) == 1
    assert group_count(MergeConfig(op="merge", grouping="hc", keep=0.75, multiple_of=4), num_experts=8, top_k=2) == 8
    small = MergeConfig(op="merge", grouping="ream", keep=2, max_group_size=3)
    with pytest.raises(UsageError, match="2 groups of 3 do not hold 8 experts"):
        group_count(small, num_experts=8, top_k=2)


def test_scores_without_mean_outputs() -> None:
    found = scores()
    for layer in found.layers:
        del layer.statistics["mean_output"]
    with pytest.raises(UsageError, match="no `mean_output`"):
        plan({"grouping": "hc"}, found)


@pytest.mark.parametrize("share", [0.35, 0.5, 0.7, 0.99])
def test_ranks_fill_the_bytes(share: float) -> None:
    made = plan({"grouping": "router", "keep": 2, "keep_differences": {"expert_bytes": share}})
    for layer in made.layers:
        (rank,) = set(layer.ranks.values())
        assert set(layer.ranks) == {"gate_proj", "up_proj", "down_proj"}
        # two whole experts, 6 members with three pairs of factors 16 + 24 wide, 8 x 3 scales; two bytes each
        now, more = (2 * (2 * WEIGHTS + 6 * r * 3 * 40 + 24) for r in (rank, rank + 1))
        assert now <= share * 8 * WEIGHTS * 2
        assert more > share * 8 * WEIGHTS * 2
        assert stored_bytes(MergePlan(made.config, (layer,)), [SHAPE]) == now + 8 * 48


def test_ranks_are_no_larger_than_matrices() -> None:
    made = plan({"grouping": "router", "keep": 2, "keep_differences": {"rank": 100}})
    assert made.layers[0].ranks == {"gate_proj": 16, "up_proj": 16, "down_proj": 16}


def test_bytes_of_merged_layers() -> None:
    reduced, kept = plan({"grouping": "hc"}), plan({"grouping": "hc", "router": "keep"})
    assert stored_bytes(reduced, [SHAPE] * 2) == 2 * 4 * (WEIGHTS * 2 + 48)
    assert stored_bytes(kept, [SHAPE] * 2) == 2 * (4 * WEIGHTS * 2 + 8 * 48)


def test_no_room_for_differences() -> None:
    with pytest.raises(UsageError, match="leaves no room for differences beside 4 whole experts"):
        plan({"grouping": "router", "keep": 4, "keep_differences": {"expert_bytes": 0.5}})


def test_one_group_for_each_expert_has_no_differences() -> None:
    made = plan({"grouping": "router", "keep": 1.0, "keep_differences": {"rank": 2}})
    assert all(len(layer.groups) == EXPERTS for layer in made.layers)


RECIPE: dict[str, Any] = {"model": "reference", "calibration": {"dataset": "reference"}}


@pytest.mark.parametrize(
    ("step", "tier", "path", "why"),
    [
        ({"grouping": "hc", "max_group_size": 4}, "stock", "max_group_size", "only the grouping `ream`"),
        ({"grouping": "hc", "router": "keep"}, "stock", "router", "export.tier: plugin"),
        ({"grouping": "hc", "keep_differences": {"rank": 2}}, "stock", "keep_differences", "export.tier: plugin"),
        (
            {"grouping": "hc", "keep_differences": {"rank": 2}, "weighting": "uniform"},
            "plugin",
            "weighting",
            "averages",
        ),
        ({"grouping": "router", "criterion": "man"}, "plugin", "criterion", "saliency"),
    ],
)
def test_settings_without_effect_or_beyond_the_tier(step: dict[str, Any], tier: str, path: str, why: str) -> None:
    given = RECIPE | {"steps": [{"op": "merge", "keep": 8} | step], "export": {"tier": tier}}
    with pytest.raises(RecipeError) as error:
        load_recipe(given, runnable=True)
    assert f"steps.0.{path}" in str(error.value) and why in str(error.value)


@pytest.mark.parametrize("size", [{}, {"rank": 2, "expert_bytes": 0.5}, {"rank": 0}, {"expert_bytes": 1.0}])
def test_differences_have_one_size(size: dict[str, Any]) -> None:
    step = {"op": "merge", "keep": 8, "grouping": "hc", "keep_differences": size}
    with pytest.raises(RecipeError, match="keep_differences"):
        load_recipe(RECIPE | {"steps": [step], "export": {"tier": "plugin"}})


def test_only_quantization_follows_kept_routers() -> None:
    merge = {"op": "merge", "keep": 8, "grouping": "hc", "router": "keep"}
    prune = {"op": "prune", "criterion": "reap", "keep": 0.5}
    given = RECIPE | {"export": {"tier": "plugin"}}
    with pytest.raises(RecipeError, match=r"steps\.1\.op.*put it after this one"):
        load_recipe(given | {"steps": [merge, prune]}, runnable=True)
    load_recipe(given | {"steps": [prune, merge, {"op": "quantize", "bits": 4}]}, runnable=True)
