"""The figures of a model: costs derived from its configuration, tasks and speed measured, kept on disk and reused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.rewrite import open_rewritten
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.writer import write_json
from moe_compress.errors import MeasurementError
from moe_compress.eval.config import EvalConfig
from moe_compress.eval.cost import cost
from moe_compress.recipe import Recipe
from moe_compress.steps import Surroundings, apply, plan_step


def measure(
    original: Checkpoint | None, compressed: Checkpoint, config: EvalConfig, folder: Path | None, around: Surroundings
) -> list[dict[str, Any]]:
    """Tasks and speed of the original (when wanted) and the compressed checkpoint; kept in `folder` and reused.

    What cannot be measured costs no result: `not_measured` says why, {"tasks": why, "speed": why}.
    """
    wanted = {"baseline": original if config.baseline else None, "compressed": compressed}
    measured: dict[str, dict[str, Any]] = {"baseline": {}, "compressed": {}}
    for name, checkpoint in wanted.items():
        if checkpoint is not None:
            kept = folder / f"{name}.json" if folder is not None else None
            if kept is not None and kept.exists():
                measured[name] = json.loads(kept.read_text(encoding="utf-8"))
            else:
                measured[name] = evaluate(checkpoint, config, around, name)
                if kept is not None and "not_measured" not in measured[name]:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    write_json(kept, measured[name])
    if config.speed:
        from moe_compress.eval.speed import measure_speed

        folders = {name: checkpoint.folder for name, checkpoint in wanted.items() if checkpoint is not None}
        with around.progress.stage("speed", 1, "measurement") as stage:
            for name, speed in measure_speed(folders, device=around.device).items():
                reasons = measured[name].get("not_measured", {}) | speed.get("not_measured", {})
                measured[name] |= speed | ({"not_measured": reasons} if reasons else {})
            stage.advance()
    return [measured["baseline"], measured["compressed"]]


def evaluate(checkpoint: Checkpoint, config: EvalConfig, around: Surroundings, name: str) -> dict[str, Any]:
    """Tasks and settings as the harness returns them, or why there are none; nothing when no task is wanted."""
    from moe_compress.eval.harness import evaluate as run_tasks

    if not config.tasks:
        return {}
    with around.progress.stage(f"eval {name}", 100, "percent") as stage:
        shown = 0

        def tell(done: int, total: int) -> None:
            nonlocal shown
            while shown < 100 * done // total:
                shown += 1
                stage.advance(f"{done}/{total} requests")

        try:
            found = run_tasks(checkpoint.folder, config, around.device, tell)
        except MeasurementError as error:
            found = {"not_measured": {"tasks": str(error)}}
        while shown < 100:
            shown += 1
            stage.advance()
    return found


def model_figures(checkpoint: Checkpoint, measured: dict[str, Any]) -> dict[str, Any]:
    """M of `report.json`: costs derived from the configuration, the rest as measured."""
    figures = cost_figures(cost(checkpoint.config, stored_bytes=checkpoint.index.nbytes).to_dict())
    return figures | {key: value for key, value in measured.items() if key != "settings"}


def cost_figures(costs: dict[str, Any]) -> dict[str, Any]:
    """The costs that `report.json` holds of a model."""
    keys = ("total_params", "active_params", "stored_bytes", "active_bytes_per_token", "flops_per_token",
            "decode_flops_per_token", "expert_flops_per_token", "kv_bytes_per_token", "context", "notes")  # fmt: skip
    return {key: costs[key] for key in keys} | {"experts_per_token_mean": costs["experts_per_token"]}


def random_baselines(recipe: Recipe, source: Checkpoint, work: Path, around: Surroundings) -> Iterator[dict[str, Any]]:
    """The evaluation of random prunings at the recipe's own budgets, one per seed.

    Which experts are super experts is known from the scores of the first step.
    """
    for seed in range(recipe.eval.random_baselines):
        file = work / "eval" / f"random-{seed}.json"
        if not file.exists():
            current, scores = source, Scores.load(work / "step-0" / "scores")
            for number, step in enumerate(recipe.steps):
                title = f"random seed {seed}"
                drawn = step.model_copy(update={"criterion": "random", "seed": seed})
                plan = plan_step(drawn, scores, current)
                kept = [found.select(layer.keep) for found, layer in zip(scores.layers, plan.layers, strict=True)]
                scores = replace(scores, layers=kept)
                folder = work / f"random-{seed}-{number}"
                apply(plan, current, folder, around, title)
                current = open_rewritten(folder, current)
            settings = recipe.eval.model_copy(update={"speed": False})
            found = evaluate(current, settings, around, f"random seed {seed}")
            write_json(file, {"seed": seed} | model_figures(current, found))
            for folder in work.glob(f"random-{seed}-*"):
                shutil.rmtree(folder)
        yield json.loads(file.read_text(encoding="utf-8"))
