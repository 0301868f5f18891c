"""What runs refuse before they begin, and what they take over: scores, evaluations, an interrupted run's state."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import moe_compress
from moe_compress import manifest, measure, output
from moe_compress.checkpoint.record import Record
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.cli import app
from moe_compress.compress import scoring
from moe_compress.errors import CheckpointError, DataError, ResumeError, UsageError, VerificationError
from moe_compress.estimate import disk_needed, stages
from moe_compress.eval import harness
from moe_compress.preview import look_ahead
from moe_compress.progress import SilentProgress
from moe_compress.recipe import load_recipe
from moe_compress.verification import checks
from moe_compress.workspace import locked
from tests.tiny_checkpoint import tiny_checkpoint, tiny_recipe

EVALUATED = {"tasks": ["reference_sums"], "limit": 2, "speed": False}


class Recording(SilentProgress):
    """Notes the stages and what was said; raises at the beginning of the stage that is called `stop`."""

    def __init__(self, stop: str = "nowhere") -> None:
        self.stop, self.stages, self.notes = stop, [""], [""]

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "layer") -> Iterator[Any]:
        if self.stop in name:
            raise KeyboardInterrupt
        self.stages.append(name)
        with super().stage(name, total, unit) as stage:
            yield stage

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def scores(source: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores") / "scores"
    moe_compress.score(tiny_recipe(source, texts, 0.75), folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("resume", [False, True])
def test_folders_that_would_destroy_each_other(source: Path, texts: Path, tmp_path: Path, resume: bool) -> None:
    model, out = Path(shutil.copytree(source, tmp_path / "model")), tmp_path / "out"
    recipe, before = tiny_recipe(model, texts, 0.75), content(tmp_path)
    for folder, work in (
        (out, out),
        (out, out / "work"),
        (out, tmp_path),
        (out, model / "work"),
        (model / "out", None),
    ):
        with pytest.raises(UsageError, match="none inside the other"):
            moe_compress.run(recipe, folder, work=work, resume=resume)
    (model / "manifest.json").write_text(
        json.dumps({"tool": "moe-compress 0.0.1"})
    )  # a result to be compressed further
    with pytest.raises(UsageError, match="none inside the other"):
        moe_compress.run(recipe, model, force=True, resume=resume)
    with pytest.raises(UsageError, match="what a run made"):
        moe_compress.evaluate(source, output=model, speed=False)
    (model / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"WORK .* and the model"):
        moe_compress.score(recipe, model / "scores")
    with pytest.raises(UsageError, match=r"--output .* and the checkpoint"):
        moe_compress.evaluate(model, output=model, speed=False)
    with pytest.raises(UsageError, match=r"config\.json is not a folder"):
        moe_compress.evaluate(model, output=source / "config.json" / "results", speed=False)
    assert content(tmp_path) == before


@pytest.mark.usefixtures("no_reload")
def test_a_finished_run_removes_no_foreign_work_folder(source: Path, tmp_path: Path) -> None:
    recipe, out, home = {"model": str(source), "eval": {"speed": False}}, tmp_path / "out", tmp_path / "home"
    report = moe_compress.run(recipe, out)
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    assert moe_compress.run(recipe, out, resume=True, work=home) == report
    assert (home / "thesis.tex").exists()


def test_a_work_folder_in_use(source: Path, texts: Path, scores: Path, tmp_path: Path) -> None:
    recipe, before = tiny_recipe(source, texts, 0.75), content(scores)
    with locked(tmp_path / "out.work"), pytest.raises(UsageError, match=r"in use by process .* --work"):
        moe_compress.run(recipe, tmp_path / "out")
    with locked(scores), pytest.raises(UsageError, match="in use by process"):
        moe_compress.score(recipe, scores)
    assert content(scores) == before


def test_a_revision_of_a_folder_has_no_effect(source: Path) -> None:
    for model in (str(source), "reference"):
        with pytest.raises(UsageError, match="`--revision` has no effect"):
            moe_compress.inspect(model, revision="main")


def test_a_dry_run_refuses_what_the_run_would(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tmp_path / "recipe.json", tmp_path / "out"
    recipe.write_text(json.dumps(tiny_recipe(source, texts, 0.75)))

    def message(*options: str) -> str:
        done = CliRunner().invoke(app, ["run", str(recipe), str(out), "--dry-run", *options])
        assert done.exit_code == (0 if not done.stderr else 1 if "free" in done.stderr else 2)
        return done.stderr

    assert message() == ""
    assert "none inside the other" in message("--work", str(out))
    assert "did you mean `reference_sums`" in message("eval.tasks=[reference_sum]")
    out.mkdir()
    assert "--force" in message() and message("--force") == ""
    out.rmdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=100, free=10))
    assert "needs about" in message()
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize(
    ("steps", "keep_steps", "random_baselines", "copies"),
    [(0, False, 0, 1), (1, False, 0, 1), (1, True, 0, 1), (2, False, 0, 2), (5, False, 0, 2), (5, True, 0, 5),
     (1, False, 3, 2), (3, False, 3, 4), (3, True, 3, 6)],
)  # fmt: skip
def test_disk_holds_every_checkpoint_of_the_worst_moment(
    source: Path, steps: int, keep_steps: bool, random_baselines: int, copies: int
) -> None:
    recipe = load_recipe({
        "model": str(source),
        "calibration": {"dataset": "a", "num_samples": 1, "sequence_length": 2},
        "steps": [{"op": "prune", "criterion": "reap", "keep": 1.0}] * steps,
        "eval": {"tasks": ["a"], "random_baselines": random_baselines} if random_baselines else {},
    })  # fmt: skip
    config = open_checkpoint(str(source)).config
    _, outlooks = look_ahead(recipe, config)
    hidden = 2 * 4 * 2 * config.hidden_size if steps else 0
    needed = disk_needed(
        recipe, outlooks, stages(recipe, outlooks, "cpu"), source_bytes=1_000_000, keep_steps=keep_steps
    )
    assert needed == copies * 1_050_000 + hidden


def test_disk_holds_checkpoints_as_small_as_they_get(source: Path) -> None:
    """The second step's beside the first's; the source is there already."""
    steps = [{"op": "prune", "criterion": "reap", "keep": keep} for keep in (0.75, 0.5)]
    recipe = load_recipe({"model": str(source), "calibration": {"dataset": "a", "num_samples": 1, "sequence_length": 2},
                          "steps": steps})  # fmt: skip
    _, outlooks = look_ahead(recipe, open_checkpoint(str(source)).config)
    sizes = [outlook.stored_bytes for outlook in outlooks]
    assert sizes[0] > sizes[1] > sizes[2]
    needed = disk_needed(recipe, outlooks, stages(recipe, outlooks, "cpu"))
    assert needed == pytest.approx(1.05 * (sizes[1] + sizes[2]), rel=0.01)


@pytest.mark.usefixtures("no_reload")
def test_a_failed_check_says_where_the_checkpoint_is(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "check_logits", lambda folder: checks.Check(False, "not computed here."))
    with pytest.raises(VerificationError) as caught:
        moe_compress.run(tiny_recipe(source, texts, 0.75), tmp_path / "out")
    kept = tmp_path / "out.work" / "step-0" / "checkpoint"
    assert str(caught.value).endswith(f"; the checkpoint is kept in {kept}.") and (kept / "report.md").exists()
    assert not caught.value.checks["logits"]["passed"]


# --------------------------------------------------------------------------------------------------------------- scores


def test_score_recovers_from_a_mistake(source: Path, texts: Path, tmp_path: Path) -> None:
    wrong, recipe, work = (
        tiny_recipe(source, tmp_path / "no.txt", 0.75),
        tiny_recipe(source, texts, 0.75),
        tmp_path / "a",
    )
    with pytest.raises(DataError, match="does not exist"):
        moe_compress.score(wrong, work)
    assert not work.exists()
    with pytest.raises(KeyboardInterrupt):
        moe_compress.score(recipe, work, progress=Recording("score"))
    with pytest.raises(ResumeError, match="--force"):
        moe_compress.score(recipe, work, overrides=["calibration.seed=1"])
    found = moe_compress.score(recipe, work, overrides=["calibration.seed=1"], force=True)
    assert found.fingerprint["seed"] == 1 and (work / "scores.json").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"choose another\.$") as caught:
        moe_compress.score(recipe, tmp_path / "b", force=True)
    assert "--work" not in str(caught.value), "`score` has no such option"


def test_scores_of_another_model_or_calibration(source: Path, texts: Path, scores: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(source, texts, 0.75)
    assert moe_compress.plan(recipe, scores=scores)["warnings"] == []
    twin = tiny_checkpoint(tmp_path / "twin", seed=1)  # of the same shapes
    for verb in (lambda: moe_compress.plan(recipe, scores=scores, model=twin),
                 lambda: moe_compress.run(recipe, tmp_path / "out", scores=scores, model=twin)):  # fmt: skip
        with pytest.raises(UsageError, match="measured on another model"):
            verb()
    assert not (tmp_path / "out.work").exists()
    for change, said in (
        ("calibration.seed=1", "calibration.seed 0, not 1"),
        ("calibration.num_samples=4", "sequences 8, not 4"),
        ("calibration.dataset=reference", "not reference"),
    ):
        warnings = moe_compress.plan(recipe, scores=scores, overrides=[change])["warnings"]
        assert said in " ".join(warnings) and all("other calibration settings" in text for text in warnings)
        with pytest.raises(UsageError, match=f"other calibration tokens .*{said}"):
            moe_compress.run(recipe, tmp_path / "out", scores=scores, overrides=[change])
    assert moe_compress.plan(recipe, scores=scores, overrides=["calibration.batch_size=1"])["warnings"] == []
    with pytest.raises(UsageError, match="holds no scores"):
        moe_compress.run(recipe, tmp_path / "out", scores=twin)
    quantize = recipe | {"steps": [{"op": "quantize", "method": "rtn", "bits": 4, "group_size": 16}]}
    with pytest.raises(UsageError, match="has nothing to choose by them"):
        moe_compress.run(quantize, tmp_path / "out", scores=scores)
    with pytest.raises(UsageError, match="`--scores` has no effect"):
        moe_compress.run({"model": str(source), "eval": {"speed": False}}, tmp_path / "out", scores=scores)


@pytest.mark.usefixtures("no_reload")
def test_a_run_takes_measured_scores(source: Path, texts: Path, scores: Path, tmp_path: Path) -> None:
    """And ends with the very bits of a run that measures; the second step measures what the first one left."""
    recipe, progress = tiny_recipe(source, texts, 0.75, 0.5), Recording("apply")
    with pytest.raises(KeyboardInterrupt):
        moe_compress.run(recipe, tmp_path / "out", scores=scores, progress=progress)
    assert not any("score" in stage for stage in progress.stages)
    progress = Recording()
    moe_compress.run(recipe, tmp_path / "out", resume=True, progress=progress)
    assert [stage for stage in progress.stages if "score" in stage] == ["step 2/2 prune: score"]
    moe_compress.run(recipe, tmp_path / "measured")
    assert content(tmp_path / "out") == content(tmp_path / "measured")
    assert (scores / "scores.json").exists()


@pytest.mark.usefixtures("no_reload")
def test_the_report_lists_the_calibration_of_every_step(source: Path, texts: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(source, texts, 0.75, 0.5)
    recipe["calibration"] |= {"min_tokens_per_expert": 100}
    with pytest.raises(VerificationError):
        moe_compress.run(recipe, tmp_path / "out")
    recipe["calibration"] |= {"min_tokens_per_expert": 1}
    report = moe_compress.run(recipe, tmp_path / "out", force=True)
    second = report["settings"]["calibration"]["step 2"]
    assert report["settings"]["calibration"]["experts"] == 16 and second["experts"] == 12
    assert "* step 2:" in (tmp_path / "out" / "report.md").read_text()
    records = [Record("prune", {}, "reap", 0, coverage={"starved": starved}) for starved in ([], [[1, 3]])]
    assert ["layer 1 expert 3"] in output.calibration_of(records)["step 2"].values()  # type: ignore[index]


# ---------------------------------------------------------------------------------------------- identity and evaluation


@pytest.mark.usefixtures("no_reload")
def test_other_libraries_do_not_continue_a_run(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tiny_recipe(source, texts, 0.75), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        moe_compress.run(recipe, out, progress=Recording("apply"))
    assert json.loads((tmp_path / "out.work" / "moe-compress.json").read_text())["run"]["device"] == "cpu"
    for name, refused in (("torch", True), ("transformers", True), ("datasets", False)):
        versions = manifest.library_versions() | {name: "99"}
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "library_versions", lambda versions=versions: versions)
            with pytest.raises(ResumeError if refused else KeyboardInterrupt) as caught:
                moe_compress.run(recipe, out, resume=True, progress=Recording("apply"))
            assert not refused or f"versions.{name}" in str(caught.value)


def test_a_wrong_task_costs_nothing(source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = harness._manager  # lm-eval's own 13,000 files take long to index
    monkeypatch.setattr(harness, "_manager", lambda paths, include_defaults: manager(paths, include_defaults=False))
    for evaluation, message in (
        ({"tasks": ["reference_smus"]}, "did you mean `reference_sums`"),
        ({"tasks": ["reference_sums"], "max_gen_toks": 512}, "context of the model is 512"),
    ):
        progress = Recording()
        with pytest.raises((DataError, UsageError), match=message):
            moe_compress.run(tiny_recipe(source, texts, 0.75, eval=evaluation), tmp_path / "out", progress=progress)
        assert progress.stages == [""] and not (tmp_path / "out.work").exists()


@pytest.mark.usefixtures("no_reload")
def test_another_evaluation_continues_the_same_run(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was evaluated with the same settings is taken over, what was not is evaluated."""
    evaluations: list[tuple[str, Any]] = []

    def evaluate(checkpoint: Any, config: Any, around: Any, name: str) -> dict[str, Any]:
        evaluations.append((name, config.limit))
        if name.startswith("random seed 1"):
            raise KeyboardInterrupt
        return {"tasks": {}, "settings": {"limit": config.limit}}

    monkeypatch.setattr(measure, "evaluate", evaluate)
    recipe, out = tiny_recipe(source, texts, 0.75, eval=EVALUATED | {"random_baselines": 2}), tmp_path / "out"
    progress = Recording()
    with pytest.raises(KeyboardInterrupt):
        moe_compress.run(recipe, out, progress=progress)
    assert ["reference_sums" in note and "built-in" in note for note in progress.notes] == [False, True]
    names = ["baseline", "compressed", "random seed 0", "random seed 1"]
    assert evaluations == [(name, 2) for name in names]
    evaluations.clear()
    with pytest.raises(KeyboardInterrupt):
        moe_compress.run(recipe, out, resume=True)
    assert evaluations == [("random seed 1", 2)]
    evaluations.clear()
    progress = Recording()
    report = moe_compress.run(
        recipe, out, resume=True, overrides=["eval.random_baselines=1", "eval.limit=1"], progress=progress
    )
    assert evaluations == [(name, 1) for name in names[:3]]
    assert not any("score" in stage for stage in progress.stages) and report["settings"]["eval"] == {"limit": 1}
    with pytest.raises(UsageError, match="--force"):  # a finished result is not that of another evaluation
        moe_compress.run(recipe, out, resume=True)


@pytest.mark.usefixtures("no_reload")
@pytest.mark.parametrize(
    "steps",
    [
        [{"op": "prune", "criterion": "reap", "keep": 0.5}, {"op": "quantize", "method": "rtn", "bits": 4}],
        [{"op": "quantize", "method": "rtn", "average_bits": 3.5, "options": [2, 4, 8], "keep_option": True}],
    ],
    ids=["prune, then bits", "budget"],
)
def test_random_baselines_draw_what_is_chosen_and_leave_the_rest(
    steps: list[dict[str, Any]], source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: dict[str, list[dict[str, Any]]] = {}
    scored = Recording()

    def evaluate(checkpoint: Any, config: Any, around: Any, name: str) -> dict[str, Any]:
        if name.startswith("random"):
            places = [tmp_path / "out.work" / f"random-{name[-1]}-{number}" for number in range(len(steps))]
            plans[name] = [json.loads((place / "plan.json").read_text()) for place in places]
        return {"tasks": {}, "settings": {}}

    monkeypatch.setattr(measure, "evaluate", evaluate)
    recipe = tiny_recipe(source, texts, 0.75, eval=EVALUATED | {"random_baselines": 2}) | {
        "steps": steps,
        "export": {"tier": "plugin"},
    }
    report = moe_compress.run(recipe, tmp_path / "out", progress=scored)
    own = json.loads((tmp_path / "out" / "plan.json").read_text())["steps"]
    assert list(plans) == ["random seed 0", "random seed 1"]
    assert len({json.dumps(found) for found in (own, *plans.values())}) == 3, "each draws another"
    assert sum("score" in stage for stage in scored.stages) == 1, "nothing is measured again"
    for found, drawn in zip(plans.values(), report["random"], strict=True):
        if steps[0]["op"] == "prune":
            assert found[0]["config"]["criterion"] == "random"
            assert [len(layer["keep"]) for layer in found[0]["layers"]] == [4, 4]
            assert drawn["stored_bytes"] == report["compressed"]["stored_bytes"]
        else:
            assert found[0]["config"]["allocation"] == "random" and found[0]["allocation"]["average_bits"] <= 3.5
            assert drawn["stored_bytes"] < report["baseline"]["stored_bytes"]


def test_kept_results_are_those_of_the_same_checkpoint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[str] = []

    def evaluate(checkpoint: Any, config: Any, around: Any, name: str) -> dict[str, Any]:
        evaluated.append(f"{checkpoint.folder.name} {config.limit}")
        return {"tasks": {"a": {"acc": {"value": len(evaluated)}}}, "settings": {}}

    monkeypatch.setattr(measure, "evaluate", evaluate)
    twin = tiny_checkpoint(tmp_path / "twin", seed=1)
    for ckpt, limit in ((source, 1), (source, 1), (twin, 1), (twin, 2), (twin, 2)):
        settings = EVALUATED | {"limit": limit}
        report = moe_compress.evaluate(ckpt, output=tmp_path / "results", **settings)
        assert report["compressed"]["tasks"]["a"]["acc"]["value"] == len(evaluated)
    assert evaluated == ["model 1", "twin 1", "twin 2"]
    (tmp_path / "results" / "compressed.json").write_text("[]")  # no file of ours
    moe_compress.evaluate(twin, output=tmp_path / "results", **EVALUATED)
    assert len(evaluated) == 4


@pytest.mark.usefixtures("no_reload")
def test_evaluated_from_start_to_finish(source: Path, texts: Path, tmp_path: Path) -> None:
    """The evaluating half with nothing replaced: tasks, random baselines, speed, and `eval` on the result."""
    out, results, progress = tmp_path / "out", tmp_path / "results", Recording()
    evaluation = EVALUATED | {"random_baselines": 1, "speed": True}
    report = moe_compress.run(tiny_recipe(source, texts, 0.75, eval=evaluation), out, progress=progress)
    assert json.loads((out / "report.json").read_text()) == report
    wanted = {"eval baseline", "eval compressed", "eval random seed 0", "speed"}
    assert wanted <= set(progress.stages)
    for side in ("baseline", "compressed"):
        assert report[side]["speed"]["decode_tokens_per_s"] > 0 and report[side]["peak_rss_bytes"] > 0
        assert 0 <= report[side]["tasks"]["reference_sums"]["exact_match"]["value"] <= 1
    assert [draw["seed"] for draw in report["random"]] == [0] and "reference_sums" in report["random_summary"]
    assert report["settings"]["eval"]["num_documents"] == {"reference_sums": 2}
    for name in ("README.md", "report.md"):
        text = (out / name).read_text()
        assert "reference_sums" in text and "decode" in text, name

    first = moe_compress.evaluate(out, baseline=source, output=results, **EVALUATED)
    assert first["compressed"]["tasks"] == report["compressed"]["tasks"]
    progress = Recording()
    again = moe_compress.evaluate(out, baseline=source, output=results, progress=progress, **EVALUATED)
    assert again == first == json.loads((results / "report.json").read_text())
    assert progress.stages == [""], "nothing is evaluated twice"


def test_a_full_disk_while_scoring_is_said_in_its_own_words(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scoring, "score", full)
    with pytest.raises(CheckpointError, match="is full; free some space and run the same command again"):
        moe_compress.score(tiny_recipe(source, texts, 0.75), tmp_path / "scores")
