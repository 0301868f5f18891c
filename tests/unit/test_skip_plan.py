"""Thresholds of dynamic skipping, against the gate values themselves."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from moe_compress.calibrate.scores import RATIO_BINS, LayerScores, Scores
from moe_compress.compress.skip.config import SkipConfig
from moe_compress.compress.skip.plan import plan_skip
from moe_compress.errors import UsageError

TOKENS, K = 500, 4
LAYERS = [(1, 16, K), (3, 16, K)]


def config(**settings: Any) -> SkipConfig:
    return SkipConfig.model_validate({"op": "skip"} | settings)


def gates(seed: int) -> np.ndarray:
    """Gate values [TOKENS, K], more uneven for larger seeds."""
    return np.random.default_rng(seed).random((TOKENS, K)) ** (1 + seed)


def counted(values: np.ndarray) -> np.ndarray:
    ratios = np.sort(values, axis=1)[:, ::-1]
    ratios = ratios / ratios[:, :1]
    edges = np.arange(RATIO_BINS + 1) / RATIO_BINS
    return np.stack([np.histogram(part, edges)[0] for part in (ratios[:, 1:], ratios[:, 1])]).astype(float)


GATES = [gates(0), gates(2)]
SCORES = Scores(
    [
        LayerScores(layer, experts, k, TOKENS, 0.0, {}, tables={"gate_ratios": counted(values)})
        for (layer, experts, k), values in zip(LAYERS, GATES, strict=True)
    ],
    {},
)


def skipped(values: np.ndarray, threshold: float) -> float:
    """Share of the slots that the rule leaves out."""
    return float((values < threshold * values.max(axis=1, keepdims=True)).mean())


@pytest.mark.parametrize("target", [0.1, 0.25, 0.5, 0.7])
def test_every_layer_skips_the_target(target: float) -> None:
    plan = plan_skip(config(target_skip=target), SCORES, LAYERS)
    for values, layer in zip(GATES, plan.layers, strict=True):
        assert skipped(values, layer.threshold) == pytest.approx(layer.predicted_skip, abs=1e-12)
        assert layer.predicted_skip == pytest.approx(target, abs=3 / TOKENS)
    assert plan.layers[0].threshold != plan.layers[1].threshold
    assert plan.predicted_skip == pytest.approx(target, abs=3 / TOKENS)
    json.dumps(plan.to_json())


def test_one_threshold_for_all_layers() -> None:
    plan = plan_skip(config(target_skip=0.5, scope="global"), SCORES, LAYERS)
    first, second = plan.layers
    assert first.threshold == second.threshold
    assert first.predicted_skip is not None and second.predicted_skip is not None
    assert first.predicted_skip < 0.45 and second.predicted_skip > 0.55, "uneven gate values are skipped more"
    assert skipped(np.concatenate(GATES), first.threshold) == pytest.approx(0.5, abs=3 / TOKENS)


def test_median_is_that_of_the_second_over_the_first() -> None:
    plan = plan_skip(config(threshold="median"), SCORES, LAYERS)
    for values, layer in zip(GATES, plan.layers, strict=True):
        ranked = np.sort(values, axis=1)
        assert layer.threshold == pytest.approx(np.median(ranked[:, -2] / ranked[:, -1]), abs=0.01)


def test_a_given_threshold_needs_no_scores() -> None:
    plan = plan_skip(config(threshold=0.3), None, LAYERS)
    assert [(layer.threshold, layer.predicted_skip) for layer in plan.layers] == [(0.3, None)] * 2
    assert plan.predicted_skip is None and len(plan.to_json()["summary"]) == 1
    assert plan_skip(config(threshold=0.3), SCORES, LAYERS).predicted_skip == pytest.approx(
        np.mean([skipped(values, round(0.3 * RATIO_BINS) / RATIO_BINS) for values in GATES])
    )


def test_what_is_impossible_is_refused() -> None:
    with pytest.raises(UsageError, match=r"target_skip: 0\.8 .* the most is 0\.75"):
        plan_skip(config(target_skip=0.8), SCORES, LAYERS)
    with pytest.raises(UsageError, match="this model uses one per token"):
        plan_skip(config(threshold=0.5), None, [(0, 16, 1)])
    with pytest.raises(UsageError, match="know nothing of gate ratios"):
        plan_skip(config(target_skip=0.5), Scores([LayerScores(1, 16, K, 10, 0.0, {})], {}), LAYERS[:1])


@pytest.mark.parametrize("wrong", [{}, {"target_skip": 0.5, "threshold": 0.5}, {"threshold": 1.0},
                                   {"threshold": "mean"}, {"target_skip": 1.0}])  # fmt: skip
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"either `target_skip` or `threshold`|should be"):
        config(**wrong)
