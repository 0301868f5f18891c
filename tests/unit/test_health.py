"""Routing health of hand-made scores, and of scores that a sweep measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moe_compress
from moe_compress.calibrate.locality import Locality
from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.console import print_inspection
from moe_compress.errors import UsageError
from moe_compress.health import routing_health
from tests.tiny_checkpoint import tiny_checkpoint, tiny_recipe, write_texts

TRACE = [[0, 1]] * 24 + [[0, 2]] * 8  # of 32 tokens; expert 3 is never used


def layer(index: int, max_abs: list[float], *, watched: bool = True) -> LayerScores:
    locality = Locality(4, 2)
    locality.add(np.array([TRACE]))
    statistics = {"tokens": np.array([32.0, 24.0, 8.0, 0.0]), "max_abs": np.array(max_abs)}
    return LayerScores(index, 4, 2, 32, 0.5, statistics | (locality.statistics() if watched else {}))


def test_figures_of_a_layer() -> None:
    scores = Scores([layer(0, [1, 1, 50, 0]), layer(1, [1, 1, 1, 0])], {})
    found = routing_health(scores, 4, expert_bytes=1e6)
    first = found["layers"][0]
    assert (first["smallest_load"], first["largest_load"]) == (0.0, 2.0)
    shares = [1 / 2, 3 / 8, 1 / 8]
    assert first["used_evenly"] == pytest.approx(np.exp(-sum(p * np.log(p) for p in shares)) / 4)
    assert (found["dead"], found["super"]) == ([[0, 3], [1, 3]], [[0, 2]])
    # Two experts at a time, three in all: only the change to expert 2 is a miss, and none once there is room for all.
    assert first["hit_rates"] == {"1": 63 / 64, "2": 1.0, "3": 1.0}
    assert found["hit_rates"] == first["hit_rates"]
    assert first["srp"]["16"]["value"] > first["srp"]["16"]["by_chance"] > 0
    assert found["srp"]["16"]["value"] == pytest.approx(first["srp"]["16"]["value"]), "two layers alike"
    assert "64" not in found["srp"], "no sequence has so many tokens"
    assert "(8 of 8, 8 MB)" in found["offloading"][1] and "0 B to fetch" in found["offloading"][1]


def test_scores_without_windows_say_so() -> None:
    found = routing_health(Scores([layer(0, [1, 1, 1, 0], watched=False)], {}), 1, expert_bytes=1.0)
    assert "srp" not in found and "score again" in found["offloading"][0]


def test_inspect_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    recipe = tiny_recipe(model, write_texts(tmp_path / "texts.txt"), 0.5)
    moe_compress.score(recipe, tmp_path / "scores")
    facts = moe_compress.inspect(model, scores=tmp_path / "scores")
    measured = Scores.load(tmp_path / "scores").layers
    loads = [one["largest_load"] for one in facts["routing"]["layers"]]
    assert loads == [one.statistics["tokens"].max() / one.statistics["tokens"].mean() for one in measured]
    print_inspection(facts)
    shown = capsys.readouterr().out
    assert "SRP, 16 tokens" in shown and "offloading: with 2 x top-k experts" in shown
    assert "routing" not in moe_compress.inspect(model)
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="another model"):
        moe_compress.inspect(other, scores=tmp_path / "scores")
