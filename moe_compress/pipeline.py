"""What each verb does, from a recipe to a finished folder. It decides the order and leaves the work to others.

checkpoint -> step -> checkpoint -> ... -> verify -> eval -> report -> OUT
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from moe_compress import __version__
from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.rewrite import PROBE_FILE
from moe_compress.checkpoint.source import Checkpoint, open_checkpoint
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.errors import CheckpointError, MeasurementError, UsageError
from moe_compress.eval.config import EvalConfig
from moe_compress.manifest import FORMAT, describe_source, file_hashes, hardware, identity_digest, library_versions
from moe_compress.measure import measure, model_figures, random_baselines
from moe_compress.models.layers import find_moe_layers
from moe_compress.models.skeleton import build_skeleton
from moe_compress.preview import disk_needed, expert_counts, inspect, plan
from moe_compress.progress import Progress, SilentProgress
from moe_compress.recipe import Recipe, check_tier, dump_recipe
from moe_compress.report.build import build_report
from moe_compress.report.card import license_fields, model_card
from moe_compress.report.markdown import report_markdown
from moe_compress.report.paths import without_local_paths
from moe_compress.steps import Surroundings, load_record, run_identity, run_step, score_step
from moe_compress.verification import checks as verification
from moe_compress.workspace import (
    discarded_if_empty,
    explained_disk_errors,
    open_workspace,
    place,
    refuse_existing,
    remove_leftovers,
    remove_workspace,
    require_space,
    same_disk,
)

__all__ = ["evaluate_checkpoint", "inspect", "plan", "run", "score", "verify"]


def score(recipe: Recipe, work: Path, *, device: str = "auto", progress: Progress | None = None) -> Scores:
    """Measure the experts of the recipe's model; the scores in `work` serve any later plan of the same model."""
    source = open_checkpoint(recipe.model, recipe.revision)
    around = _surroundings(recipe, device, progress)
    identity = {"source": describe_source(source), "calibration": recipe.calibration.model_dump(mode="json")}
    open_workspace(work, identity, resume=True, force=False)
    with explained_disk_errors(work):
        return score_step(source, work, around, "score")


def run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    work: Path | None = None,
    keep_steps: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress, verify, evaluate and report; returns what is written to `out/report.json`.

    Raises `UsageError` before any work when `out` exists (without `force`), `ResumeError` when `resume` finds another
    run, and `VerificationError` when a check fails: the checkpoint then stays in the work folder. Resuming a run that
    was complete returns its report.
    """
    check_tier(recipe)
    out = out.absolute()
    work = (work or out.with_name(f"{out.name}.work")).absolute()
    if not resume:
        refuse_existing(out, force)
    source = open_checkpoint(recipe.model, recipe.revision)
    expert_counts(recipe, source.config, find_moe_layers(build_skeleton(source.config))[0])
    around = _surroundings(recipe, device, progress)
    identity = {"version": __version__, "source": describe_source(source), "recipe": _json(recipe)}
    if resume and _is_result(out, identity):
        _tidy(out, None if keep_steps else work)
        report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return report
    refuse_existing(out, force)
    if not work.exists():
        require_space(work, disk_needed(recipe, source.config, source.index.nbytes))
        if not same_disk(work, out):
            require_space(out, source.index.nbytes)
    open_workspace(work, identity, resume=resume, force=force)
    with discarded_if_empty(work), explained_disk_errors(work):
        finished, records = _run_steps(recipe, source, work, around, keep_steps)
        plans = [
            json.loads((work / f"step-{number}" / "plan.json").read_text(encoding="utf-8"))
            for number in range(len(records))
        ]
        (finished.folder / "recipe.yaml").write_text(_published_recipe(recipe), encoding="utf-8")
        write_json(finished.folder / "plan.json", {"steps": plans})
        manifest = _manifest(recipe, source, records, around) | {"identity": identity_digest(identity)}
        manifest = without_local_paths(manifest) | {"files": file_hashes(finished.folder)}
        write_json(finished.folder / verification.MANIFEST_FILE, manifest)
        checks = verification.verify(finished.folder, around.progress)
        measured: list[dict[str, Any]] = [{}, {}]
        randoms: list[dict[str, Any]] = []
        if all(check["passed"] for check in checks.values()):
            measured = measure(source, finished, recipe.eval, work / "eval", around)
            if "tasks" not in measured[1].get("not_measured", {}):
                randoms = list(random_baselines(recipe, source, work, around))
        report = without_local_paths(_report(recipe, source, finished, records, measured, randoms, checks, manifest))
        _write_report(finished.folder, report, recipe, plans, source)
        manifest |= {"files": file_hashes(finished.folder)}
        write_json(finished.folder / verification.MANIFEST_FILE, manifest)
        verification.raise_on_failure(checks)
        place(finished.folder, out)
    _tidy(out, None if keep_steps else work)
    return report


def verify(out: Path) -> dict[str, dict[str, Any]]:
    """Check a finished folder again; raises `VerificationError` when a check fails."""
    if not out.is_dir():
        raise UsageError(f"{out} is not a folder.")
    checks = verification.verify(out, SilentProgress())
    verification.raise_on_failure(checks)
    return checks


def evaluate_checkpoint(
    ckpt: str, *, baseline: str | None, config: EvalConfig, output: Path | None, device: str = "auto"
) -> dict[str, Any]:
    """Measure a checkpoint, and its original beside it when one is named; nothing is verified."""
    compressed = open_checkpoint(ckpt)
    original = open_checkpoint(baseline) if baseline is not None else None
    recipe = Recipe(model=ckpt, eval=config)
    around = _surroundings(recipe, device, None)
    measured = measure(original, compressed, config, output, around)
    for found in measured:
        if "tasks" in found.get("not_measured", {}):
            raise MeasurementError(found["not_measured"]["tasks"])
    settings = {"model": baseline or ckpt, "eval": _without_tasks(measured[1]), "versions": library_versions()}
    figures = [
        model_figures(one, found) if one else {} for one, found in zip((original, compressed), measured, strict=True)
    ]
    report = build_report(figures[0], figures[1], settings=settings)
    if output is not None:
        write_json(output / "report.json", report)
    return report


def _is_result(out: Path, identity: dict[str, Any]) -> bool:
    """Whether OUT is what the run of this identity makes: it was killed after OUT appeared."""
    if not (out / verification.MANIFEST_FILE).exists():
        return False
    try:
        manifest = verification.load_manifest(out)
    except CheckpointError:
        return False
    return bool(manifest["identity"] == identity_digest(identity))


def _tidy(out: Path, work: Path | None) -> None:
    """Remove what a complete run no longer needs."""
    remove_leftovers(out)
    if work is not None and work.exists():
        remove_workspace(work)


def _run_steps(
    recipe: Recipe, source: Checkpoint, work: Path, around: Surroundings, keep_steps: bool
) -> tuple[Checkpoint, list[dict[str, Any]]]:
    """All steps in order; the last checkpoint and every step's record."""
    if not recipe.steps:
        return run_identity(source, work / "identity", around), []
    current, records = source, []
    for number, step in enumerate(recipe.steps):
        folder = work / f"step-{number}"
        later = work / f"step-{number + 1}" / "step.json"
        if not later.exists():
            title = f"step {number + 1}/{len(recipe.steps)} {step.op}"
            current = run_step(step, current, folder, around, title)
        records.append(load_record(folder))
        before = work / f"step-{number - 1}" / "checkpoint"
        if number and not keep_steps:
            shutil.rmtree(before, ignore_errors=True)
    return current, records


def _report(
    recipe: Recipe,
    source: Checkpoint,
    finished: Checkpoint,
    records: list[dict[str, Any]],
    measured: list[dict[str, Any]],
    randoms: list[dict[str, Any]],
    checks: dict[str, dict[str, Any]],
    manifest: dict[str, Any],
) -> dict[str, Any]:
    settings = {
        "model": source.model_id,
        "revision": source.revision,
        "criterion": [record["config"]["criterion"] for record in records],
        "steps": [record["config"] for record in records],
        "calibration": records[0]["coverage"] | records[0]["calibration"] if records else None,
        "eval": _without_tasks(measured[1]),
        "versions": manifest["versions"],
        "hardware": manifest["hardware"],
    }
    baseline = model_figures(source, measured[0])
    return build_report(baseline, model_figures(finished, measured[1]), randoms, checks, settings)


def _write_report(
    folder: Path, report: dict[str, Any], recipe: Recipe, plans: list[dict[str, Any]], source: Checkpoint
) -> None:
    write_json(folder / "report.json", report)
    text = _published_recipe(recipe)
    (folder / "report.md").write_text(report_markdown(report, text, plans), encoding="utf-8")
    card = model_card(
        report,
        text,
        base_model=source.model_id,
        revision=source.revision,
        license_fields=license_fields(source.folder),
        ops=[step.op for step in recipe.steps],
        tier=recipe.export.tier,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _published_recipe(recipe: Recipe) -> str:
    return dump_recipe(Recipe.model_validate(without_local_paths(recipe.model_dump())))


def _manifest(
    recipe: Recipe, source: Checkpoint, records: list[dict[str, Any]], around: Surroundings
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "tool": _tool(__version__),
        "source": describe_source(source),
        "recipe": _json(recipe),
        "steps": records,
        "stored_bytes": source.index.nbytes - sum(step["dropped_bytes"] for step in records),
        "versions": library_versions(),
        "hardware": hardware(around.device),
        "probe": PROBE_FILE,
    }


def _surroundings(recipe: Recipe, device: str, progress: Progress | None) -> Surroundings:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is the one that shows
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here; use --device cpu.")
    return Surroundings(recipe.calibration, recipe.export.max_shard_size, device, progress or SilentProgress())


def _tool(version: str) -> str:
    return f"moe-compress {version}"


def _without_tasks(measured: dict[str, Any]) -> dict[str, Any]:
    return dict(measured.get("settings", {}))


def _json(model: PruneConfig | Recipe) -> dict[str, Any]:
    return model.model_dump(mode="json")
