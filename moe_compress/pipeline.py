"""What each verb does, from a recipe to a finished folder. It decides the order and leaves the work to others.

checkpoint -> step -> checkpoint -> ... -> verify -> eval -> report -> OUT
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from moe_compress import preview
from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.durable import replace_durably
from moe_compress.checkpoint.memory import give_back
from moe_compress.checkpoint.record import Record
from moe_compress.checkpoint.source import Checkpoint, open_checkpoint
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.operation import Outlook
from moe_compress.compress.scoring import read_calibration
from moe_compress.compress.scoring import score as measure_all
from moe_compress.compress.surroundings import Surroundings
from moe_compress.errors import CheckpointError, MeasurementError, UsageError, VerificationError
from moe_compress.estimate import disk_needed, memory_warnings, peaks, stages
from moe_compress.eval.config import EvalConfig
from moe_compress.manifest import describe_source, identity_digest, identity_of, library_versions, made_by
from moe_compress.measure import measure, model_figures, random_baselines
from moe_compress.output import Output
from moe_compress.preparation import GivenScores, check_inputs, folder_of, look, surroundings
from moe_compress.preview import foresee, inspect, plan
from moe_compress.progress import Progress, SilentProgress
from moe_compress.recipe import Recipe, check_tier
from moe_compress.report.build import build_report
from moe_compress.steps import FIRST_SCORES, load_record, make_step, run_identity, run_step
from moe_compress.verification import checks as verification
from moe_compress.workspace import (
    discarded_if_empty,
    explained_disk_errors,
    is_result,
    is_workspace,
    locked,
    open_workspace,
    place,
    refuse_existing,
    refuse_overlap,
    refuse_unwritable,
    remove_leftovers,
    remove_workspace,
    require_space,
    same_disk,
)

__all__ = ["dry_run", "evaluate_checkpoint", "foresee", "inspect", "plan", "run", "score", "verify"]


def score(
    recipe: Recipe, work: Path, *, force: bool = False, device: str = "auto", progress: Progress | None = None
) -> Scores:
    """Measure the experts of the recipe's model; the scores in `work` serve any later plan of the same model.

    An interrupted measurement is continued, unless `force` starts it over.
    """
    around = surroundings(recipe, device, progress)
    config, folder, _, _ = look(recipe, {"WORK": work})
    if force or not (work / "scores.json").exists():
        around = replace(around, data=read_calibration(folder, config, recipe.calibration))
    source = open_checkpoint(recipe.model, recipe.revision)
    identity = made_by(around.device) | {
        "source": describe_source(source),
        "calibration": recipe.calibration.model_dump(mode="json"),
    }
    first = make_step(recipe.steps[0]) if recipe.steps else None
    identity |= first.score_settings() if first is not None else {}
    with locked(work, option=""):
        open_workspace(work, identity, resume=not force, force=force, option="")
        with discarded_if_empty(work), explained_disk_errors(work, "run the same command again"):
            measure_experts = first.score if first is not None else measure_all
            return measure_experts(source, work, around, "score")


def run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    work: Path | None = None,
    keep_steps: bool = False,
    scores: Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress, verify, evaluate and report; returns what is written to `out/report.json`.

    `scores` is a folder that `score` wrote for this model and calibration; the first step takes them as they are.
    Raises `UsageError` before any work when `out` exists (without `force`), `ResumeError` when `resume` finds another
    run, and `VerificationError` when a check fails: the checkpoint then stays in the work folder. Resuming a run that
    was complete returns its report; one that was not takes the `eval` of this recipe.
    """
    out, work = _places(out, work)
    around = surroundings(recipe, device, progress)
    config, folder, outlooks, warnings = _look(recipe, out, work, scores, resume=resume, force=force)
    if resume and (report := _finished(recipe, out)) is not None:
        _tidy(out, None if keep_steps else work)
        return report
    refuse_existing(out, force)
    given = GivenScores.for_first_step(recipe, scores) if scores is not None else None
    foreseen = stages(recipe, outlooks, around.device)
    for warning in [*warnings, *memory_warnings(peaks(foreseen), around.device)]:
        around.progress.note(f"warning: {warning}")
    check_inputs(recipe, folder, config)
    calibrated = any(make_step(step).is_calibrated for step in recipe.steps)
    if given is not None or (calibrated and not _has_scores(work)):
        around = replace(around, data=read_calibration(folder, config, recipe.calibration))
    source = open_checkpoint(recipe.model, recipe.revision)
    if given is not None:
        given.require_fitting(describe_source(source), around)
    if not work.exists():
        stored = source.index.nbytes
        require_space(work, disk_needed(recipe, outlooks, foreseen, source_bytes=stored, keep_steps=keep_steps))
        if not same_disk(work, out):
            require_space(out, stored)
    # What is evaluated changes no bit of the checkpoint, so another evaluation goes on from the same state.
    identity = identity_of(recipe, source) | {"recipe": recipe.model_dump(mode="json", exclude={"eval"})}
    with locked(work):
        open_workspace(work, identity | made_by(around.device), resume=resume, force=force)
        if given is not None and not _has_scores(work):
            given.copy_to(work / FIRST_SCORES)
        report = _run(recipe, source, out, work, around, keep_steps)
    _tidy(out, None if keep_steps else work)
    return report


def _run(
    recipe: Recipe, source: Checkpoint, out: Path, work: Path, around: Surroundings, keep_steps: bool
) -> dict[str, Any]:
    """All the work of `run`, in a work folder that is open; OUT is there when it returns."""
    with discarded_if_empty(work), explained_disk_errors(work):
        finished, records = _run_steps(recipe, source, work, around, keep_steps)
        output = Output(recipe, source, finished, records, work, around.device)
        output.write_records()
        give_back()  # a process beside this one loads the result
        checks = verification.verify(finished.folder, around.progress)
        measured: list[dict[str, Any]] = [{}, {}]
        randoms: list[dict[str, Any]] = []
        if all(check["passed"] for check in checks.values()):
            measured = measure(source, finished, recipe.eval, work / "eval", around)
            if "tasks" not in measured[1].get("not_measured", {}):
                randoms = list(random_baselines(recipe, source, work, around))
        report = output.write_report(measured, randoms, checks)
        try:
            verification.raise_on_failure(checks)
        except VerificationError as error:
            raise VerificationError(f"{error}; the checkpoint is kept in {finished.folder}.", checks) from None
        place(finished.folder, out)
    return report


def dry_run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    work: Path | None = None,
    keep_steps: bool = False,
    scores: Path | None = None,
    device: str = "auto",
    hours: bool = False,
) -> dict[str, Any]:
    """The plan of a run, after everything that would keep it from beginning; writes nothing.

    With `hours` the machine is looked at for two seconds, and `time` says how long the run takes.
    """
    out, work = _places(out, work)
    config, folder, *_ = _look(recipe, out, work, scores, resume=resume, force=force)
    if scores is not None:
        GivenScores.for_first_step(recipe, scores)
    check_inputs(recipe, folder, config)
    planned = plan(recipe, scores=scores, keep_steps=keep_steps, device=device, clocked_at=work if hours else None)
    if not work.exists():
        require_space(work, planned["disk_needed"])
    return planned


def sweep(recipe: Recipe, scores: Path, setting: str, values: Sequence[float], output: Path) -> list[dict[str, Any]]:
    """The frontier of a quantize step (see `preview.sweep`), kept in the file `output`, as CSV if its name says so."""
    if not output.parent.is_dir():
        raise UsageError(f"the folder of {output} does not exist.")
    found = preview.sweep(recipe, scores, setting, values)
    if output.suffix.lower() == ".csv":
        temporary = output.with_name(f"{output.name}.part")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
        replace_durably(temporary, output)
    else:
        write_json(output, found)
    return found


def verify(out: Path, *, progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """Check a finished folder again; raises `VerificationError` when a check fails."""
    if not out.is_dir():
        raise UsageError(f"{out} is not a folder.")
    checks = verification.verify(out, progress or SilentProgress())
    verification.raise_on_failure(checks)
    return checks


def evaluate_checkpoint(
    ckpt: str,
    *,
    baseline: str | None,
    config: EvalConfig,
    output: Path | None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint, and its original beside it when one is named; nothing is verified."""
    if output is not None:
        refuse_overlap({"--output": output} | folder_of("the checkpoint", ckpt))
        refuse_unwritable(output)
        if is_result(output):
            raise UsageError(f"{output} is what a run made; choose another --output.")
    compressed = open_checkpoint(ckpt, quantized=True)
    original = open_checkpoint(baseline, quantized=True) if baseline is not None else None
    for one in filter(None, (original, compressed)):
        model_figures(one, {})  # refuses what the report could not hold before anything is measured
    recipe = Recipe(model=ckpt, eval=config)
    around = surroundings(recipe, device, progress)
    measured = measure(original, compressed, config, output, around)
    for found in measured:
        if "tasks" in found.get("not_measured", {}):
            raise MeasurementError(found["not_measured"]["tasks"])
    settings = {
        "model": baseline or ckpt,
        "eval": dict(measured[1].get("settings", {})),
        "versions": library_versions(),
    }
    figures = [
        model_figures(one, found) if one else {} for one, found in zip((original, compressed), measured, strict=True)
    ]
    report = build_report(figures[0], figures[1], settings=settings)
    if output is not None:
        write_json(output / "report.json", report)
    return report


def _places(out: Path, work: Path | None) -> tuple[Path, Path]:
    """OUT and the work folder, in full."""
    out = out.absolute()
    return out, (work or out.with_name(f"{out.name}.work")).absolute()


def _look(
    recipe: Recipe, out: Path, work: Path, scores: Path | None, *, resume: bool, force: bool
) -> tuple[PretrainedConfig, Path, list[Outlook], list[str]]:
    """`look` for a run into OUT, after what is refused at once."""
    check_tier(recipe)
    if not resume:
        refuse_existing(out, force)
    for folder in (out, work):
        refuse_unwritable(folder)
    return look(recipe, {"OUT": out, "the work folder": work} | ({"--scores": scores} if scores else {}))


def _has_scores(work: Path) -> bool:
    """Whether the first step has been measured, or was given scores."""
    return (work / FIRST_SCORES / "scores.json").exists()


def _finished(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """The report in OUT when it is what this recipe makes: the run was killed after OUT appeared."""
    file = out / verification.MANIFEST_FILE
    if not file.exists():
        return None
    try:
        manifest = verification.load_manifest(out)
    except CheckpointError:
        return None
    source = open_checkpoint(recipe.model, recipe.revision)
    if manifest["identity"] != identity_digest(identity_of(recipe, source)):
        return None
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def _tidy(out: Path, work: Path | None) -> None:
    """Remove what a complete run no longer needs."""
    remove_leftovers(out)
    if work is not None and is_workspace(work):
        with locked(work):
            remove_workspace(work)


def _run_steps(
    recipe: Recipe, source: Checkpoint, work: Path, around: Surroundings, keep_steps: bool
) -> tuple[Checkpoint, list[Record]]:
    """All steps in order; the last checkpoint and every step's record."""
    if not recipe.steps:
        return run_identity(source, work / "identity", around), []
    current, records = source, list[Record]()
    around = replace(around, original=source)
    for number, step in enumerate(recipe.steps):
        folder = work / f"step-{number}"
        later = work / f"step-{number + 1}" / "step.json"
        if not later.exists():
            title = f"step {number + 1}/{len(recipe.steps)} {step.op}"
            current = run_step(make_step(step), current, folder, around, title)
        records.append(load_record(folder))
        before = work / f"step-{number - 1}" / "checkpoint"
        if number and not keep_steps:
            shutil.rmtree(before, ignore_errors=True)
    return current, records
