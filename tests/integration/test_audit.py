"""`moe-compress audit` from start to finish on a tiny checkpoint: what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import moe_compress
from moe_compress.auditing.audit import AuditSettings, sample
from moe_compress.calibrate.scores import Scores
from moe_compress.cli import app
from moe_compress.compress.prune.judged import audited_criteria
from moe_compress.compress.prune.plan import criterion_scores
from moe_compress.errors import ResumeError, UsageError
from moe_compress.report.audit import NO_BETTER, audit_markdown, verdicts
from tests.integration.test_run import interrupted_at
from tests.tiny_checkpoint import tiny_checkpoint, tiny_recipe, write_texts

LAYERS, EXPERTS, SEQUENCES = 2, 5, 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("audited")
    model = tiny_checkpoint(folder / "model", num_hidden_layers=LAYERS, num_experts=EXPERTS)
    return tiny_recipe(model, write_texts(folder / "texts.txt", documents=120), 0.6)


@pytest.fixture(scope="module")
def audited(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("audit") / "work"
    moe_compress.audit(recipe, work, experts=3, sequences=SEQUENCES)
    return work


def test_what_is_written(recipe: dict[str, Any], audited: Path) -> None:
    found = json.loads((audited / "audit.json").read_text())
    assert sorted(file.name for file in audited.iterdir() if file.name[:3] != "moe") == [
        "ablation", "audit.json", "audit.md", "scores.json", "scores.safetensors",
    ]  # fmt: skip
    losses = json.loads((audited / "ablation" / "losses.json").read_text())["losses"]
    scores = Scores.load(audited)
    assert found["criteria_of_the_recipe"] == ["reap"] and len(losses["whole"]) == SEQUENCES
    assert found["loss"] == pytest.approx(np.mean(losses["whole"]))
    criteria = audited_criteria(["reap"], 0)
    assert {one["criterion"] for one in found["criteria"]} == criteria.keys() >= {"random", "reap", "mone", "frequency"}
    for layer, measured in zip(found["layers"], scores.layers, strict=True):
        assert len(layer["experts"]) == 3 and layer["layer"] == measured.layer
        for position, expert in enumerate(layer["experts"]):
            change = np.subtract(losses[f"{measured.layer}/{expert}"], losses["whole"]).mean()
            assert layer["changes"][position] == pytest.approx(change)
            assert measured.statistics["ablation"][expert] == pytest.approx(change)
            low, high = layer["changes_ci"][position]
            assert low < change < high
        assert np.isnan(measured.statistics["ablation"]).sum() == EXPERTS - 3
        for name, config in criteria.items():
            assert layer["scores"][name] == criterion_scores(config, measured)[layer["experts"]].tolist()
    page = (audited / "audit.md").read_text()
    assert page == audit_markdown(found) and "6 experts of 2 layers were taken out" in page


def test_more_experts_later_and_pruning_by_them(recipe: dict[str, Any], audited: Path, tmp_path: Path) -> None:
    """All experts after a sample of them; then the folder is one of scores that `criterion: ablation` can use."""
    by_importance = recipe | {"steps": [recipe["steps"][0] | {"criterion": "ablation"}]}
    with pytest.raises(UsageError, match="no loss without 2 of the 5 experts of layer 0"):
        moe_compress.plan(by_importance, scores=audited)
    before = json.loads((audited / "ablation" / "losses.json").read_text())["losses"]
    found = moe_compress.audit(recipe, audited, experts=None, sequences=SEQUENCES)
    after = json.loads((audited / "ablation" / "losses.json").read_text())["losses"]
    assert len(after) == 1 + LAYERS * EXPERTS and {name: after[name] for name in before} == before
    planned = moe_compress.plan(by_importance, scores=audited)["steps"][0]["layers"]
    for layer, measured in zip(planned, found["layers"], strict=True):
        assert layer["keep"] == sorted(np.argsort(-np.array(measured["changes"]))[:3].tolist())
    out = tmp_path / "out"
    moe_compress.run(by_importance, out, scores=audited)
    kept = [layer["keep"] for layer in json.loads((out / "plan.json").read_text())["steps"][0]["layers"]]
    assert kept == [layer["keep"] for layer in planned]
    # The result says what the audit found, without naming places on this machine.
    carried = json.loads((out / "audit.json").read_text())
    assert carried["criteria"] == found["criteria"] and str(audited.parent) not in json.dumps(carried)
    assert "audit.json" in json.loads((out / "manifest.json").read_text())["files"]
    said = verdicts(found)[0]
    assert said in (out / "report.md").read_text()
    assert "Does the criterion mean anything?" in (page := (out / "report.html").read_text())
    assert said.split(" (")[0].replace("`", "").replace("'", "&#39;") in page


@pytest.mark.parametrize("units", [1, LAYERS + 1, 2 * LAYERS + 1])
def test_interrupted_and_continued(units: int, recipe: dict[str, Any], tmp_path: Path) -> None:
    """In the scores, in the whole model's pass, among the experts: the same in the end."""
    options: dict[str, Any] = {"experts": 3, "sequences": SEQUENCES, "seed": 1}
    whole = moe_compress.audit(recipe, tmp_path / "whole", **options)
    with interrupted_at(units) as progress:
        moe_compress.audit(recipe, tmp_path / "cut", **options, progress=progress)
    assert not (tmp_path / "cut" / "audit.json").exists()
    assert moe_compress.audit(recipe, tmp_path / "cut", **options) == whole


def test_scores_made_before_are_used(recipe: dict[str, Any], tmp_path: Path) -> None:
    moe_compress.score(recipe, tmp_path / "scores")
    with interrupted_at(LAYERS) as progress:  # the first stage is the whole model's pass already
        moe_compress.audit(
            recipe, tmp_path / "work", sequences=2, experts=3, scores=tmp_path / "scores", progress=progress
        )
    assert (tmp_path / "work" / "scores.json").exists()
    other = recipe | {"calibration": recipe["calibration"] | {"seed": 5}}
    with pytest.raises(UsageError, match="other calibration tokens"):
        moe_compress.audit(other, tmp_path / "other", experts=3, scores=tmp_path / "scores")
    assert not (tmp_path / "other").exists()


def test_refusals(recipe: dict[str, Any], audited: Path, tmp_path: Path) -> None:
    for options, said in (
        ({"experts": 2}, "fewer than 3"),
        ({"experts": 6}, "layer 0 has 5 experts"),
        ({"layers": 3}, "2 layers with experts"),
        ({"sequences": 1}, "2 sequences"),
    ):
        with pytest.raises(UsageError, match=said):
            moe_compress.audit(recipe, tmp_path / "work", **options)
    assert not (tmp_path / "work").exists()
    with pytest.raises(ResumeError, match="held-out tokens"):
        moe_compress.audit(recipe, audited, experts=3, sequences=SEQUENCES + 1)
    done = CliRunner().invoke(app, ["audit", "demo", str(tmp_path / "x"), "--experts", "some"])
    assert done.exit_code == 2 and "should be a number, or `all`" in done.stderr


def test_a_larger_sample_contains_the_smaller() -> None:
    counts = {0: 5, 2: 8}
    three, four = (sample(counts, AuditSettings(experts=count)) for count in (3, 4))
    assert all(set(three[layer]) < set(four[layer]) for layer in three)
    assert list(sample(counts, AuditSettings(experts=3, layers=1))) == [0]
    assert sample(counts, AuditSettings(experts=3, seed=1)) != three


def test_what_the_reader_is_told(audited: Path) -> None:
    found = json.loads((audited / "audit.json").read_text())
    for one in found["criteria"]:
        one["better_than_random"] = one["criterion"] == "mone"
    said = verdicts(found)
    assert re.match(
        r"`reap` is no better than random at ranking a layer's experts, on this model and text \(rho [+-]\d\.\d\d, ",
        said[0],
    )
    assert said[0].endswith("do not choose experts by it.")
    assert (
        said[1].startswith("no better than random within layers: ")
        and "`reap`" not in said[1]
        and "`mone`" not in said[1]
    )
    found["criteria"].sort(key=lambda one: one["criterion"] != "mone")
    assert verdicts(found)[1].startswith("`mone` agrees best")
    shown = audit_markdown(found)
    assert shown.count(NO_BETTER) >= len(found["criteria"]) - 1
