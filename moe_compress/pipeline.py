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

from moe_compress import __version__, preview
from moe_compress.calibrate.agreement import AUDIT_FILE
from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.durable import replace_durably, sha256_of
from moe_compress.checkpoint.memory import give_back
from moe_compress.checkpoint.record import Record
from moe_compress.checkpoint.rewrite import PROBE_FILE
from moe_compress.checkpoint.source import REFERENCE, Checkpoint, open_checkpoint, open_config, small_files
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.operation import Outlook
from moe_compress.compress.scoring import read_calibration
from moe_compress.compress.scoring import score as measure_all
from moe_compress.compress.surroundings import Surroundings, resolved
from moe_compress.errors import CheckpointError, MeasurementError, UsageError, VerificationError
from moe_compress.estimate import disk_needed, memory_warnings, peaks, stages
from moe_compress.eval.config import EvalConfig
from moe_compress.manifest import FORMAT, describe_source, file_hashes, hardware, identity_digest, library_versions
from moe_compress.measure import measure, model_figures, random_baselines
from moe_compress.preview import (
    calibration_differences,
    foresee,
    inspect,
    look_ahead,
    plan,
    require_same_model,
    step_warnings,
    task_warnings,
)
from moe_compress.progress import Progress, SilentProgress
from moe_compress.recipe import Recipe, check_tier, dump_recipe
from moe_compress.report.audit import audit_section, load_audit
from moe_compress.report.build import build_report
from moe_compress.report.card import inherited_fields, model_card
from moe_compress.report.experts import EXPERTS_FILE, expert_statistics
from moe_compress.report.markdown import report_markdown
from moe_compress.report.page import write_page
from moe_compress.report.paths import without_local_paths
from moe_compress.report.scores import write_eval_results
from moe_compress.steps import load_record, make_step, run_identity, run_step
from moe_compress.verification import checks as verification
from moe_compress.workspace import (
    TOOL,
    discarded_if_empty,
    explained_disk_errors,
    is_workspace,
    locked,
    open_workspace,
    place,
    refuse_existing,
    refuse_overlap,
    remove_leftovers,
    remove_workspace,
    require_space,
    same_disk,
)

FIRST_SCORES = "step-0/scores"  # in the work folder

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
    identity = made_by(around) | {
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
    check_tier(recipe)
    out, work = _places(out, work)
    if not resume:
        refuse_existing(out, force)
    around = surroundings(recipe, device, progress)
    folders = {"OUT": out, "the work folder": work} | ({"--scores": scores} if scores else {})
    config, folder, outlooks, warnings = look(recipe, folders)
    if resume and out.exists():
        report = _finished(recipe, out)
        if report is not None:
            _tidy(out, None if keep_steps else work)
            return report
    refuse_existing(out, force)
    given = _given_scores(recipe, scores)
    foreseen = stages(recipe, outlooks, around.device)
    for warning in [*warnings, *memory_warnings(peaks(foreseen), around.device)]:
        around.progress.note(f"warning: {warning}")
    if recipe.eval.tasks:
        from moe_compress.eval.harness import check_tasks

        check_tasks(folder, recipe.eval)
    for step in recipe.steps:
        make_step(step).check_inputs(folder, config)
    if given is not None or (
        any(make_step(step).is_calibrated for step in recipe.steps)
        and not (work / FIRST_SCORES / "scores.json").exists()
    ):
        around = replace(around, data=read_calibration(folder, config, recipe.calibration))
    source = open_checkpoint(recipe.model, recipe.revision)
    identity = _identity(recipe, source)
    if given is not None and scores is not None:
        require_same_model(given, identity["source"]["revision"], identity["source"]["fingerprint"], scores)
        require_same_calibration(given, around, scores)
    if not work.exists():
        stored = source.index.nbytes
        require_space(work, disk_needed(recipe, outlooks, foreseen, source_bytes=stored, keep_steps=keep_steps))
        if not same_disk(work, out):
            require_space(out, source.index.nbytes)
    # What is evaluated changes no bit of the checkpoint, so another evaluation goes on from the same state.
    identity |= {"recipe": recipe.model_dump(mode="json", exclude={"eval"})} | made_by(around)
    with locked(work):
        open_workspace(work, identity, resume=resume, force=force)
        if given is not None and not (work / FIRST_SCORES / "scores.json").exists():
            if scores is not None and (audit := load_audit(scores)):
                (work / FIRST_SCORES).mkdir(parents=True, exist_ok=True)
                write_json(work / FIRST_SCORES / AUDIT_FILE, audit)
            given.save(work / FIRST_SCORES)
        report = _run(recipe, source, out, work, around, keep_steps)
    _tidy(out, None if keep_steps else work)
    return report


def _run(
    recipe: Recipe, source: Checkpoint, out: Path, work: Path, around: Surroundings, keep_steps: bool
) -> dict[str, Any]:
    """All the work of `run`, in a work folder that is open; OUT is there when it returns."""
    with discarded_if_empty(work), explained_disk_errors(work):
        finished, records = _run_steps(recipe, source, work, around, keep_steps)
        plans = [
            json.loads((work / f"step-{number}" / "plan.json").read_text(encoding="utf-8"))
            for number in range(len(records))
        ]
        (finished.folder / "recipe.yaml").write_text(_published_recipe(recipe), encoding="utf-8")
        write_json(finished.folder / "plan.json", without_local_paths({"steps": plans}))
        scores = [work / f"step-{number}" / "scores" for number in range(len(records))]
        write_json(finished.folder / EXPERTS_FILE, expert_statistics(scores))
        audit = load_audit(work / FIRST_SCORES)
        if audit:
            write_json(finished.folder / AUDIT_FILE, without_local_paths(audit))
        manifest = _manifest(recipe, source, records, around) | {"identity": identity_digest(_identity(recipe, source))}
        manifest = without_local_paths(manifest) | {"files": file_hashes(finished.folder)}
        write_json(finished.folder / verification.MANIFEST_FILE, manifest)
        give_back()  # a process beside this one loads the result
        checks = verification.verify(finished.folder, around.progress)
        measured: list[dict[str, Any]] = [{}, {}]
        randoms: list[dict[str, Any]] = []
        if all(check["passed"] for check in checks.values()):
            measured = measure(source, finished, recipe.eval, work / "eval", around)
            if "tasks" not in measured[1].get("not_measured", {}):
                randoms = list(random_baselines(recipe, source, work, around))
        report: dict[str, Any] = without_local_paths(
            _report(recipe, source, finished, records, measured, randoms, checks, manifest)
        )
        _write_report(finished.folder, report, recipe, plans, source, audit)
        manifest |= {"files": file_hashes(finished.folder), "card": sha256_of(finished.folder / "README.md")}
        write_json(finished.folder / verification.MANIFEST_FILE, manifest)
        write_page([finished.folder])
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
    check_tier(recipe)
    out, work = _places(out, work)
    if not resume:
        refuse_existing(out, force)
    look(recipe, {"OUT": out, "the work folder": work} | ({"--scores": scores} if scores else {}))
    _given_scores(recipe, scores)
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
        refuse_overlap({"--output": output} | _folder_of("the checkpoint", ckpt))
    compressed = open_checkpoint(ckpt, quantized=True)
    original = open_checkpoint(baseline, quantized=True) if baseline is not None else None
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


def look(recipe: Recipe, folders: dict[str, Path]) -> tuple[PretrainedConfig, Path, list[Outlook], list[str]]:
    """The model's configuration, the folder of its tokenizer, what each step leads to, and warnings.

    Raises all refusals that need no weights.
    """
    refuse_overlap(folders | _folder_of("the model", recipe.model))
    config, index = open_config(recipe.model, recipe.revision)
    planned, outlooks = look_ahead(recipe, config, index)
    folder, _ = small_files(recipe.model, recipe.revision)
    return config, folder, outlooks, [*task_warnings(recipe), *step_warnings(planned)]


def _folder_of(name: str, model: str) -> dict[str, Path]:
    """The model's folder under this name; nothing for a Hub id."""
    path = REFERENCE if model == "reference" else Path(model).expanduser()
    return {name: path} if path.is_dir() else {}


def _given_scores(recipe: Recipe, folder: Path | None) -> Scores | None:
    """The scores in `folder`, judged by this recipe's least number of tokens."""
    if folder is None:
        return None
    if not recipe.steps:
        raise UsageError("`--scores` has no effect: the recipe has no steps.")
    if not make_step(recipe.steps[0]).uses_scores:
        raise UsageError("`--scores` has no effect: the first step of this recipe has nothing to choose by them.")
    return replace(Scores.load(folder), min_tokens_per_expert=recipe.calibration.min_tokens_per_expert)


def require_same_calibration(scores: Scores, around: Surroundings, folder: Path) -> None:
    """Raise `UsageError` when the scores were measured on other tokens than this run would calibrate with."""
    assert around.data is not None
    if scores.fingerprint.get("tokens") != around.data.fingerprint:
        differences = calibration_differences(scores, around.calibration)
        what = "; ".join(differences) or "the texts themselves changed"
        raise UsageError(
            f"the scores in {folder} were measured on other calibration tokens ({what}); give the same `calibration`, "
            "or leave out --scores."
        )


def made_by(around: Surroundings) -> dict[str, Any]:
    """What else decides the bits of a result: it is not continued on another device or with other libraries."""
    versions = library_versions()
    return {"device": around.device, "versions": {name: versions[name] for name in ("torch", "transformers")}}


def _calibration(records: list[Record]) -> dict[str, Any] | None:
    """The first step's calibration, and under `step 2` and so on what differs in the later ones."""
    if not records:
        return None
    found: dict[str, Any] = records[0].coverage | records[0].calibration
    for number, record in enumerate(records[1:], start=2):
        coverage = dict(record.coverage)
        if not coverage:
            continue
        starved = coverage.pop("starved", [])
        coverage["experts with fewer tokens than the minimum"] = [
            f"layer {layer} expert {expert}" for layer, expert in starved
        ]
        found[f"step {number}"] = coverage
    return found or None


def _identity(recipe: Recipe, source: Checkpoint) -> dict[str, Any]:
    """What a run is made of."""
    return {"version": __version__, "source": describe_source(source), "recipe": recipe.model_dump(mode="json")}


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
    if manifest["identity"] != identity_digest(_identity(recipe, source)):
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


def _report(
    recipe: Recipe,
    source: Checkpoint,
    finished: Checkpoint,
    records: list[Record],
    measured: list[dict[str, Any]],
    randoms: list[dict[str, Any]],
    checks: dict[str, dict[str, Any]],
    manifest: dict[str, Any],
) -> dict[str, Any]:
    settings = {
        "model": source.model_id,
        "revision": source.revision,
        "criterion": [record.label for record in records],
        "steps": [record.config for record in records],
        "calibration": _calibration(records),
        "eval": dict(measured[1].get("settings", {})),
        "versions": manifest["versions"],
        "hardware": manifest["hardware"],
    }
    baseline = model_figures(source, measured[0])
    return build_report(baseline, model_figures(finished, measured[1]), randoms, checks, settings)


def _write_report(
    folder: Path,
    report: dict[str, Any],
    recipe: Recipe,
    plans: list[dict[str, Any]],
    source: Checkpoint,
    audit: dict[str, Any],
) -> None:
    write_json(folder / "report.json", report)
    text = _published_recipe(recipe)
    markdown = report_markdown(report, text, plans) + (audit_section(audit) if audit else "")
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    card = model_card(
        report,
        text,
        base_model=source.model_id,
        revision=source.revision,
        inherited=inherited_fields(source.folder),
        tier=recipe.export.tier,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_eval_results(folder, report)


def _published_recipe(recipe: Recipe) -> str:
    return dump_recipe(Recipe.model_validate(without_local_paths(recipe.model_dump())))


def _manifest(recipe: Recipe, source: Checkpoint, records: list[Record], around: Surroundings) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "tool": f"{TOOL} {__version__}",
        "source": describe_source(source),
        "recipe": recipe.model_dump(mode="json"),
        "steps": [record.to_json() for record in records],
        "stored_bytes": source.index.nbytes - sum(record.dropped_bytes for record in records),
        "versions": library_versions(),
        "hardware": hardware(around.device),
        "probe": PROBE_FILE,
    }


def surroundings(recipe: Recipe, device: str, progress: Progress | None) -> Surroundings:
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is the one that shows
    return Surroundings(
        recipe.calibration,
        recipe.export.max_shard_size,
        resolved(device),
        progress or SilentProgress(),
        recipe.export.tier,
    )
