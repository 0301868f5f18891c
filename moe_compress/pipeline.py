"""What each verb does, from a recipe to a finished folder. It decides the order and leaves the work to others.

checkpoint -> step -> checkpoint -> ... -> verify -> eval -> report -> OUT
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_compress import __version__
from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.rewrite import PROBE_FILE, open_rewritten
from moe_compress.checkpoint.source import Checkpoint, open_checkpoint, open_config
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.compress.prune.plan import keep_count, plan_prune
from moe_compress.errors import UsageError
from moe_compress.eval.config import EvalConfig
from moe_compress.eval.cost import Cost, cost
from moe_compress.manifest import describe_source, hardware, library_versions
from moe_compress.memory import reuse_freed_memory
from moe_compress.models.layers import MoELayer, find_moe_layers, routing_groups, set_num_experts
from moe_compress.models.skeleton import build_skeleton
from moe_compress.progress import Progress, SilentProgress
from moe_compress.recipe import Recipe, check_tier, dump_recipe
from moe_compress.report.build import build_report
from moe_compress.report.card import model_card
from moe_compress.report.markdown import report_markdown
from moe_compress.steps import (
    Surroundings,
    apply,
    load_record,
    plan_step,
    run_identity,
    run_step,
    score_step,
)
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

SPARE_DISK = 1.05  # of the weights, for what lies beside them


# ------------------------------------------------------------------------------------------------ inspect, score, plan


def inspect(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """A checkpoint's architecture, experts, parameters, bytes and FLOPs per token, from its configuration alone."""
    config, index = open_config(model, revision, trust_remote_code)
    layers = find_moe_layers(build_skeleton(config))
    figures = cost(config, stored_bytes=index.nbytes if index is not None else None)
    text: Any = config.get_text_config()
    bytes_per_param = figures.stored_bytes / max(1, figures.total_params)
    return {
        "model": model,
        "architecture": (config.architectures or [type(config).__name__])[0],
        "model_type": config.model_type,
        "dtype": str(text.dtype or "unknown").removeprefix("torch."),
        "num_layers": text.num_hidden_layers,
        "moe_layers": [layer.layer for layer in layers],
        "num_experts": layers[0].num_experts,
        "top_k": layers[0].top_k,
        "shared_experts": figures.params.get("shared_experts", 0) > 0,
        "params": figures.params,
        "total_params": figures.total_params,
        "active_params": figures.active_params,
        "bytes": {part: round(count * bytes_per_param) for part, count in figures.params.items()},
        "stored_bytes": figures.stored_bytes,
        "flops_per_token": figures.prefill_flops,
        "kv_bytes_per_token": figures.kv_bytes_per_token,
        "tiers": [
            "stock: plain transformers loads it; pruning to one expert count for all layers keeps it so.",
        ],
    }


def score(recipe: Recipe, work: Path, *, device: str = "auto", progress: Progress | None = None) -> Scores:
    """Measure the experts of the recipe's model; the scores in `work` serve any later plan of the same model."""
    source = open_checkpoint(recipe.model, recipe.revision, recipe.trust_remote_code)
    around = _surroundings(recipe, device, progress)
    identity = {"source": describe_source(source), "calibration": recipe.calibration.model_dump(mode="json")}
    open_workspace(work, identity, resume=True, force=False)
    with explained_disk_errors(work):
        return score_step(source, work, around, "score")


def plan(recipe: Recipe, *, scores: Path | None = None) -> dict[str, Any]:
    """What each step would do, and the sizes it leads to.

    With scores, the first step's experts are named; without, only counts are known. Reads no weights.
    """
    config, index = open_config(recipe.model, recipe.revision, recipe.trust_remote_code)
    before = cost(config, stored_bytes=index.nbytes if index is not None else None)
    layers = find_moe_layers(build_skeleton(config))
    text: Any = config.get_text_config()
    num_experts, *counts_after = _expert_counts(recipe, config, layers[0])
    planned = []
    for number, (step, after) in enumerate(zip(recipe.steps, counts_after, strict=True)):
        entry: dict[str, Any] = {"op": step.op, "criterion": _json(step)["criterion"], "keep": step.keep}
        if scores is not None and number == 0:
            measured = Scores.load(scores)
            _require_same_layers(measured, {layer.layer: layer.num_experts for layer in layers}, scores)
            found = plan_prune(step, measured, num_decoder_layers=text.num_hidden_layers, **_routing(config))
            counts = [len(layer.keep) for layer in found.layers]
            entry["layers"] = [
                {"layer": layer.layer, "num_experts": layer.num_experts, "keep": list(layer.keep)}
                for layer in found.layers
            ]
            entry["predicted_stored_bytes"] = _bytes_after(before, sum(counts) / found.num_experts)
        entry["experts_per_layer"] = after
        planned.append(entry)
        num_experts = after
    smaller = type(config).from_dict(config.to_dict())
    if num_experts != layers[0].num_experts:
        set_num_experts(smaller, layers[0].num_experts, num_experts)
    after_cost = cost(smaller)
    scale = before.stored_bytes / max(1, cost(config).stored_bytes)
    return {
        "model": recipe.model,
        "steps": planned,
        "baseline": _figures(before.to_dict()),
        "predicted": _figures(after_cost.to_dict() | {"stored_bytes": round(after_cost.stored_bytes * scale)}),
        "disk_needed": _disk_needed(recipe, config, before.stored_bytes),
    }


# ----------------------------------------------------------------------------------------------------------------- run


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
    source = open_checkpoint(recipe.model, recipe.revision, recipe.trust_remote_code)
    _expert_counts(recipe, source.config, find_moe_layers(build_skeleton(source.config))[0])
    around = _surroundings(recipe, device, progress)
    identity = {"version": __version__, "source": describe_source(source), "recipe": _json(recipe)}
    if resume and _is_result(out, identity):
        _tidy(out, None if keep_steps else work)
        report: dict[str, Any] = json.loads((out / "report.json").read_text())
        return report
    refuse_existing(out, force)
    if not work.exists():
        require_space(work, _disk_needed(recipe, source.config, source.index.nbytes))
        if not same_disk(work, out):
            require_space(out, source.index.nbytes)
    open_workspace(work, identity, resume=resume, force=force)
    with discarded_if_empty(work), explained_disk_errors(work):
        finished, records = _run_steps(recipe, source, work, around, keep_steps)
        plans = [json.loads((work / f"step-{number}" / "plan.json").read_text()) for number in range(len(records))]
        manifest = _manifest(recipe, source, records, around)
        write_json(finished.folder / verification.MANIFEST_FILE, manifest)
        (finished.folder / "recipe.yaml").write_text(dump_recipe(recipe))
        write_json(finished.folder / "plan.json", {"steps": plans})
        checks = verification.verify(finished.folder, around.progress)
        measured: list[dict[str, Any]] = [{}, {}]
        randoms: list[dict[str, Any]] = []
        if all(check["passed"] for check in checks.values()):
            measured = _measure(source, finished, recipe.eval, work / "eval", around)
            randoms = list(_random_baselines(recipe, source, records, work, around))
        report = _report(recipe, source, finished, records, measured, randoms, checks, manifest)
        _write_report(finished.folder, report, recipe, plans, source)
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
    measured = _measure(original, compressed, config, output, around)
    settings = {"model": baseline or ckpt, "eval": _without_tasks(measured[1]), "versions": library_versions()}
    figures = [
        _model_figures(one, found) if one else {} for one, found in zip((original, compressed), measured, strict=True)
    ]
    report = build_report(figures[0], figures[1], settings=settings)
    if output is not None:
        write_json(output / "report.json", report)
    return report


def _is_result(out: Path, identity: dict[str, Any]) -> bool:
    """Whether OUT is what the run of this identity makes: it was killed after OUT appeared."""
    file = out / verification.MANIFEST_FILE
    if not file.exists():
        return False
    manifest = json.loads(file.read_text())
    return bool(
        manifest["tool"] == _tool(identity["version"])
        and all(manifest[key] == identity[key] for key in ("source", "recipe"))
    )


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


def _random_baselines(
    recipe: Recipe, source: Checkpoint, records: list[dict[str, Any]], work: Path, around: Surroundings
) -> Iterator[dict[str, Any]]:
    """The evaluation of random prunings at the recipe's own budgets, one per seed."""
    for seed in range(recipe.eval.random_baselines):
        kept = work / "eval" / f"random-{seed}.json"
        if not kept.exists():
            current = source
            for number, step in enumerate(recipe.steps):
                title = f"random seed {seed}"
                drawn = step.model_copy(update={"criterion": "random", "seed": seed})
                plan = plan_step(drawn, Scores.load(work / f"step-{number}" / "scores"), current)
                folder = work / f"random-{seed}-{number}"
                apply(plan, current, folder, around, title)
                current = open_rewritten(folder, current)
            settings = recipe.eval.model_copy(update={"speed": False})
            found = _evaluate(current, settings, around, f"random seed {seed}")
            write_json(kept, {"seed": seed} | _model_figures(current, found))
            for folder in work.glob(f"random-{seed}-*"):
                shutil.rmtree(folder)
        yield json.loads(kept.read_text())


# ------------------------------------------------------------------------------------------------- measure and report


def _measure(
    original: Checkpoint | None, compressed: Checkpoint, config: EvalConfig, folder: Path | None, around: Surroundings
) -> list[dict[str, Any]]:
    """Tasks and speed of the original (when wanted) and the compressed checkpoint; kept in `folder` and reused."""
    wanted = {"baseline": original if config.baseline else None, "compressed": compressed}
    measured: dict[str, dict[str, Any]] = {"baseline": {}, "compressed": {}}
    for name, checkpoint in wanted.items():
        if checkpoint is not None:
            kept = folder / f"{name}.json" if folder is not None else None
            if kept is not None and kept.exists():
                measured[name] = json.loads(kept.read_text())
            else:
                measured[name] = _evaluate(checkpoint, config, around, name)
                if kept is not None:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    write_json(kept, measured[name])
    if config.speed:
        from moe_compress.eval.speed import measure_speed

        folders = {name: checkpoint.folder for name, checkpoint in wanted.items() if checkpoint is not None}
        with around.progress.stage("speed", 1, "measurement") as stage:
            for name, speed in measure_speed(folders, device=around.device).items():
                measured[name] |= speed
            stage.advance()
    return [measured["baseline"], measured["compressed"]]


def _evaluate(checkpoint: Checkpoint, config: EvalConfig, around: Surroundings, name: str) -> dict[str, Any]:
    from moe_compress.eval.harness import evaluate

    if not config.tasks:
        return {}
    with around.progress.stage(f"eval {name}", 1, "model") as stage:
        found = evaluate(checkpoint.folder, config, around.device)
        stage.advance()
    return found


def _model_figures(checkpoint: Checkpoint, measured: dict[str, Any]) -> dict[str, Any]:
    """M of `report.json`: costs derived from the configuration, the rest as measured."""
    figures = _figures(cost(checkpoint.config, stored_bytes=checkpoint.index.nbytes).to_dict())
    return figures | {key: value for key, value in measured.items() if key != "settings"}


def _figures(costs: dict[str, Any]) -> dict[str, Any]:
    keys = ("total_params", "active_params", "stored_bytes", "active_bytes_per_token", "flops_per_token",
            "decode_flops_per_token", "expert_flops_per_token", "kv_bytes_per_token")  # fmt: skip
    return {key: costs[key] for key in keys} | {"experts_per_token_mean": costs["experts_per_token"]}


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
    baseline = _model_figures(source, measured[0])
    return build_report(baseline, _model_figures(finished, measured[1]), randoms, checks, settings)


def _write_report(
    folder: Path, report: dict[str, Any], recipe: Recipe, plans: list[dict[str, Any]], source: Checkpoint
) -> None:
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(report_markdown(report, dump_recipe(recipe), plans))
    card = model_card(
        report, dump_recipe(recipe), base_model=source.model_id, revision=source.revision, tier=recipe.export.tier
    )
    (folder / "README.md").write_text(card)


def _manifest(
    recipe: Recipe, source: Checkpoint, records: list[dict[str, Any]], around: Surroundings
) -> dict[str, Any]:
    return {
        "format": 1,
        "tool": _tool(__version__),
        "source": describe_source(source),
        "recipe": _json(recipe),
        "steps": records,
        "stored_bytes": source.index.nbytes - sum(step["dropped_bytes"] for step in records),
        "versions": library_versions(),
        "hardware": hardware(around.device),
        "probe": PROBE_FILE,
    }


# ------------------------------------------------------------------------------------------------------------- helpers


def _surroundings(recipe: Recipe, device: str, progress: Progress | None) -> Surroundings:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is the one that shows
    reuse_freed_memory()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here; use --device cpu.")
    return Surroundings(recipe.calibration, recipe.export.max_shard_size, device, progress or SilentProgress())


def _tool(version: str) -> str:
    return f"moe-compress {version}"


def _expert_counts(recipe: Recipe, config: Any, layer: MoELayer) -> list[int]:
    """Experts in a layer before the first step and after each one; `UsageError` when a step cannot be."""
    counts = [layer.num_experts]
    for step in recipe.steps:
        counts.append(keep_count(step, num_experts=counts[-1], top_k=layer.top_k, **_routing(config)))
    return counts


def _routing(config: Any) -> dict[str, Any]:
    """What a router's groups ask of a plan."""
    return {
        "num_groups": routing_groups(config),
        "groups_per_token": getattr(config.get_text_config(), "topk_group", None),
    }


def _disk_needed(recipe: Recipe, config: Any, source_bytes: int) -> int:
    """Bytes on disk at the worst moment.

    Two checkpoints when there are several steps or random baselines, and the float32 hidden states of all calibration
    tokens twice, entering and leaving a layer.
    """
    copies = 2 if len(recipe.steps) > 1 or recipe.eval.random_baselines else 1
    calibration = recipe.calibration
    tokens = calibration.num_samples * calibration.sequence_length if recipe.steps else 0
    return round(source_bytes * copies * SPARE_DISK) + 2 * 4 * tokens * config.get_text_config().hidden_size


def _bytes_after(before: Cost, kept: float) -> int:
    share = before.params["routed_experts"] / before.total_params
    return round(before.stored_bytes * (1 - share * (1 - kept)))


def _require_same_layers(scores: Scores, layers: dict[int, int], folder: Path) -> None:
    if {layer.layer: layer.num_experts for layer in scores.layers} != layers:
        raise UsageError(f"the scores in {folder} were measured on another model; score this one first.")


def _without_tasks(measured: dict[str, Any]) -> dict[str, Any]:
    return dict(measured.get("settings", {}))


def _json(model: PruneConfig | Recipe) -> dict[str, Any]:
    return model.model_dump(mode="json")
