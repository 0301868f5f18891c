"""Correlations, corrections and intervals of an audit against scipy, exact enumeration, and samples of known truth."""

from __future__ import annotations

import tracemalloc
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from moe_compress.calibrate import agreement as audited
from moe_compress.calibrate.agreement import AuditedLayer, agreement, holm, kendall, spearman

RNG = np.random.default_rng(0)


def layer(
    index: int, truth: np.ndarray, *, noise: float, sequences: int, seed: int, **scores: np.ndarray
) -> AuditedLayer:
    """Changes of the loss around a truth that is known, and scores."""
    drawn = np.random.default_rng([seed, index]).normal(size=(len(truth), sequences))
    return AuditedLayer(index, tuple(range(len(truth))), truth[:, None] + noise * drawn, scores)


@pytest.mark.parametrize("levels", [3, 1000], ids=["with ties", "without"])
def test_correlations_are_scipys(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = RNG.integers(levels, size=(2, 20, 9)).astype(float)
    expected = [spearmanr(*pair).statistic for pair in zip(one, other, strict=True)]
    np.testing.assert_allclose(spearman(one, other), expected, rtol=1e-12)
    expected = [kendalltau(*pair, variant="b").statistic for pair in zip(one, other, strict=True)]
    np.testing.assert_allclose(kendall(one, other), expected, rtol=1e-12)
    monkeypatch.setattr(audited, "PAIRS", 3 * 9 * 9)  # 20 rows in blocks of 3
    np.testing.assert_allclose(kendall(one, other), expected, rtol=1e-12)
    assert kendall(one[0], other[0]) == pytest.approx(expected[0], rel=1e-12)


def test_a_constant_orders_nothing() -> None:
    assert spearman(np.ones(4), np.arange(4.0)) == kendall(np.arange(4.0), np.ones(4)) == 0


def test_many_experts_take_little_memory() -> None:
    """All pairs of the 14,848 experts of a large model would be 1.8 GB."""
    scores = np.random.default_rng(0).normal(size=(2, 58 * 256))
    tracemalloc.start()
    pooled = kendall(*scores)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert abs(pooled) < 0.02 and peak < 16 << 20


def test_holm() -> None:
    """The example of Holm (1979) worked out by hand: 4, 3, 2 and 1 times the sorted values, never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_p_is_that_of_all_reorderings() -> None:
    truth, score = np.array([0.1, 0.5, 0.2, 0.9, 0.4]), np.array([1.0, 2.0, 3.0, 5.0, 4.0])
    found = agreement([layer(0, truth, noise=0.0, sequences=2, seed=0, mine=score)], seed=0)
    own = spearmanr(score, truth).statistic
    exact = np.mean([spearmanr(score, order).statistic >= own - 1e-12 for order in permutations(truth)])
    criterion = found["criteria"][0]
    assert criterion["spearman"] == pytest.approx(own)
    assert criterion["p"] == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / audited.PERMUTATIONS))


def test_layers_are_ranked_each_by_itself() -> None:
    """Scores that are right within layers and wrong between them: only the pooled value suffers."""
    truths, scores = [np.arange(6.0), 100 + np.arange(6.0)], [10 + np.arange(6.0), np.arange(6.0)]
    layers = [
        layer(index, truth, noise=0.0, sequences=3, seed=0, mine=own)
        for index, (truth, own) in enumerate(zip(truths, scores, strict=True))
    ]
    found = agreement(layers, seed=0)["criteria"][0]
    assert found["spearman"] == found["kendall"] == 1.0
    pooled = np.concatenate(scores), np.concatenate(truths)
    assert found["pooled_spearman"] == pytest.approx(spearmanr(*pooled).statistic) and found["pooled_spearman"] < 0
    assert found["pooled_kendall"] == pytest.approx(kendalltau(*pooled, variant="b").statistic)


def test_verdicts_and_what_a_choice_costs() -> None:
    rng = np.random.default_rng(1)
    truths = [rng.gamma(2.0, size=8) for _ in range(8)]
    layers = [
        layer(
            index, truth, noise=0.05, sequences=16, seed=2,
            good=truth**2, noisy=truth + rng.normal(scale=1.0, size=8), blind=rng.random(8), backwards=-truth,
        )
        for index, truth in enumerate(truths)
    ]  # fmt: skip
    found = agreement(layers, seed=3)
    criteria = {one["criterion"]: one for one in found["criteria"]}
    assert found["criteria"][0]["criterion"] == "good"
    assert criteria["good"]["better_than_random"] and criteria["good"]["spearman"] > 0.95
    assert not criteria["backwards"]["better_than_random"] and criteria["backwards"]["p"] > 0.99
    lowest = np.mean([one.changes_nN.mean(axis=1)[truth.argmin()] for one, truth in zip(layers, truths, strict=True)])
    random = np.mean([one.changes_nN.mean() for one in layers])
    assert criteria["good"]["lowest_change"] == pytest.approx(lowest)
    assert criteria["good"]["lowest_less_random"] == pytest.approx(lowest - random)
    assert criteria["good"]["lowest_less_random_ci"][1] < 0 < criteria["backwards"]["lowest_less_random_ci"][0]
    assert found["random_expert"]["change"] == pytest.approx(random)
    assert found["ceiling"] > 0.95
    cells = [cell["p_corrected"] for one in found["criteria"] for cell in one["layers"]]
    assert cells == pytest.approx(
        np.array(holm([cell["p"] for one in found["criteria"] for cell in one["layers"]])), abs=1e-12
    )
    again = agreement(layers, seed=3)
    assert again == found, "the same for the same seed"


def test_intervals_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 60 audits, the interval of a change holds its truth about 95 times in 100 (at 60: 51 is 1 in 300)."""
    monkeypatch.setattr(audited, "PERMUTATIONS", 10)
    held = 0
    for seed in range(60):
        one = layer(0, np.array([0.0, 1.0, 2.0, 0.5]), noise=1.0, sequences=40, seed=seed, mine=np.arange(4.0))
        low, high = agreement([one], seed=seed)["layers"][0]["changes_ci"][2]
        held += low <= 2.0 <= high
    assert 51 <= held <= 60


def test_noise_lowers_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a perfect criterion reaches in samples with that noise, against what one sample's halves say of it."""
    monkeypatch.setattr(audited, "PERMUTATIONS", 10)  # these and
    monkeypatch.setattr(audited, "DRAWS", 10)  # these say nothing of it
    truths = [np.random.default_rng([5, index]).normal(size=8) for index in range(20)]
    layers = [layer(i, truth, noise=4.0, sequences=16, seed=6, perfect=truth) for i, truth in enumerate(truths)]
    found = agreement(layers, seed=0)
    reached = np.mean(
        [spearmanr(truth, one.changes_nN.mean(axis=1)).statistic for truth, one in zip(truths, layers, strict=True)]
    )
    assert 0.5 < reached < 0.8, "the comparison means something"
    assert found["ceiling"] == pytest.approx(reached, abs=0.12)
    silent = [layer(i, np.zeros(8), noise=1.0, sequences=16, seed=7, any=np.arange(8.0)) for i in range(100)]
    assert agreement(silent, seed=0)["ceiling"] < 0.45
