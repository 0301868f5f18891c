"""What can be said before any weight is read: what a checkpoint is, and what a recipe would make of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.data import share
from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.rewrite import dense_config
from moe_compress.checkpoint.source import Checkpoint, open_config, small_files
from moe_compress.compress.operation import Outlook
from moe_compress.compress.quantize.step import QuantizeStep
from moe_compress.errors import UsageError
from moe_compress.eval.cost import cost, stored_by_part
from moe_compress.manifest import describe_source
from moe_compress.measure import cost_figures
from moe_compress.models.layers import find_moe_layers
from moe_compress.models.skeleton import build_skeleton
from moe_compress.recipe import Recipe
from moe_compress.steps import make_step

SPARE_DISK = 1.05  # of the weights, for what lies beside them


def inspect(model: str, *, revision: str | None = None) -> dict[str, Any]:
    """A checkpoint's architecture, experts, parameters, bytes and FLOPs per token, from its configuration alone."""
    if revision is not None and (model == "reference" or Path(model).expanduser().is_dir()):
        raise UsageError(f"`--revision` has no effect: {model} is no Hub id; leave it out.")
    config, index = open_config(model, revision, quantized=True)
    config = dense_config(config)
    layers = find_moe_layers(build_skeleton(config))
    figures = cost(config, stored_bytes=index.nbytes if index is not None else None)
    text: Any = config.get_text_config()
    bytes_per_param = figures.stored_bytes / max(1, figures.total_params)
    estimated = {part: round(count * bytes_per_param) for part, count in figures.params.items()}
    return {
        "model": model,
        "architecture": (config.architectures or [type(config).__name__])[0],
        "model_type": config.model_type,
        "dtype": str(text.dtype or "unknown").removeprefix("torch."),
        "num_layers": text.num_hidden_layers,
        "moe_layers": [layer.layer for layer in layers],
        "num_experts": layers[0].num_experts,
        "top_k": layers[0].top_k,
        "experts_per_token": figures.experts_per_token,
        "shared_experts": figures.params.get("shared_experts", 0) > 0,
        "params": figures.params,
        "total_params": figures.total_params,
        "active_params": figures.active_params,
        "bytes": stored_by_part(config, index) if index is not None else estimated,
        "bytes_are": "measured" if index is not None else "estimated",
        "stored_bytes": figures.stored_bytes,
        "flops_per_token": figures.prefill_flops,
        "context": figures.context,
        "kv_bytes_per_token": figures.kv_bytes_per_token,
        "notes": list(figures.notes),
        "tiers": [
            "stock: plain transformers loads it; pruning to one expert count for all layers keeps it so.",
        ],
    }


def plan(recipe: Recipe, *, scores: Path | None = None, keep_steps: bool = False) -> dict[str, Any]:
    """What each step would do, and the sizes it leads to.

    With scores, the first step's experts are named; without, only counts are known. Reads no weights. `warnings` are
    sentences about what may not be as it seems.
    """
    config, index = open_config(recipe.model, recipe.revision)
    before = cost(config, stored_bytes=index.nbytes if index is not None else None)
    warnings, measured = task_warnings(recipe), None
    if scores is not None:
        measured = Scores.load(scores)
        folder, commit = small_files(recipe.model, recipe.revision)
        source = None
        if index is not None:
            source = describe_source(Checkpoint(folder, config, recipe.model, commit, index))["fingerprint"]
        require_same_model(measured, commit, source, scores)
        warnings += [
            f"the scores in {scores} were measured with other calibration settings: {difference}."
            for difference in calibration_differences(measured, recipe.calibration)
        ]
    planned, after = look_ahead(recipe, config, stored_bytes=before.stored_bytes, scores=measured)
    predicted = cost(after.config).to_dict()
    predicted |= {"stored_bytes": after.stored_bytes, "active_bytes_per_token": after.active_bytes}
    return {
        "model": recipe.model,
        "steps": planned,
        "baseline": cost_figures(before.to_dict()),
        "predicted": cost_figures(predicted),
        "disk_needed": disk_needed(recipe, config, before.stored_bytes, keep_steps=keep_steps),
        "warnings": warnings,
    }


def look_ahead(
    recipe: Recipe, config: Any, *, stored_bytes: int | None = None, scores: Scores | None = None
) -> tuple[list[dict[str, Any]], Outlook]:
    """What every step would do, and the outlook at the end; `scores` are the first step's.

    Raises `UsageError` when a step cannot be, `UnsupportedModelError` when the tier does not hold this family.
    """
    figures = cost(config, stored_bytes=stored_bytes)
    around = Outlook(config, figures.stored_bytes, figures.active_bytes_per_token, scores)
    planned = []
    for step in recipe.steps:
        entry, around = make_step(step).preview(around, recipe.export.tier)
        planned.append(entry)
    return planned, around


def sweep(recipe: Recipe, scores: Path, setting: str, values: Sequence[float]) -> list[dict[str, Any]]:
    """The frontier of the recipe's quantize step: its best allocation for each value of the budget `setting`.

    Only the scores decide, nothing is read of the weights. Each entry has the budget, the bits and bytes it leads to,
    and the predicted loss with the bound that proves it. Raises `UsageError` when the recipe's first step is no
    quantize step, or a budget cannot be met.
    """
    step = make_step(recipe.steps[0]) if recipe.steps else None
    if not isinstance(step, QuantizeStep):
        raise UsageError("--sweep needs a recipe whose first step is `quantize`.")
    config, index = open_config(recipe.model, recipe.revision)
    figures = cost(config, stored_bytes=index.nbytes if index is not None else None)
    before = Outlook(config, figures.stored_bytes, figures.active_bytes_per_token, Scores.load(scores))
    return step.sweep(before, recipe.export.tier, setting, values)


def disk_needed(recipe: Recipe, config: Any, source_bytes: int, *, keep_steps: bool = False) -> int:
    """Bytes on disk at the worst moment, every checkpoint taken for as large as the source.

    A step needs the checkpoint before it (all of them with `keep_steps`) and its own; a random baseline has one for
    each step, beside the result. The float32 hidden states of all calibration tokens lie there twice, entering and
    leaving a layer.
    """
    steps = len(recipe.steps)
    copies = max(1, steps if keep_steps else min(steps, 2))
    if recipe.eval.random_baselines:
        copies = max(copies, (steps if keep_steps else 1) + steps)
    calibration = recipe.calibration
    tokens = calibration.num_samples * calibration.sequence_length if recipe.steps else 0
    hidden_size: int = config.get_text_config().hidden_size
    return round(source_bytes * copies * SPARE_DISK) + 2 * 4 * tokens * hidden_size


def require_same_model(scores: Scores, commit: str | None, fingerprint: str | None, folder: Path) -> None:
    """Raise `UsageError` when the scores in `folder` are of another checkpoint than this.

    `commit` is that of a Hub id, None for a folder; `fingerprint` that of `describe_source`, None before the weights
    are there (a commit says as much).
    """
    measured = scores.fingerprint.get("source", {})
    if measured.get("revision") != commit or fingerprint not in (None, measured.get("fingerprint")):
        raise UsageError(
            f"the scores in {folder} were measured on another model ({measured.get('model', 'unknown')}), or on files "
            "that have changed since; score this one first."
        )


def calibration_differences(scores: Scores, calibration: CalibrationConfig) -> list[str]:
    """What the calibration settings say and the scores were not measured with, a few words each."""
    measured = scores.fingerprint
    if measured.get("seed") != calibration.seed:
        return [f"calibration.seed {measured.get('seed')}, not {calibration.seed}"]
    counts = share(calibration.parts, calibration.num_samples)
    asked = [
        part.model_dump() | {"sequences": count, "tokens": count * calibration.sequence_length}
        for part, count in zip(calibration.parts, counts, strict=True)
    ]
    found = [{key: value for key, value in part.items() if key != "documents"} for part in measured.get("data", [])]
    if len(asked) != len(found):
        return [f"{len(found)} data sets, not {len(asked)}"]
    return [
        f"{key} {one.get(key)}, not {two[key]}"
        for one, two in zip(found, asked, strict=True)
        for key in two
        if one.get(key) != two[key]
    ]


def task_warnings(recipe: Recipe) -> list[str]:
    """A sentence where evaluation tasks say nothing about this model."""
    own = [task for task in recipe.eval.tasks if task == "reference" or task.startswith("reference_")]
    if recipe.model == "reference" or not own:
        return []
    return [
        f"the task `{own[0]}` asks for what the built-in model was trained on, so it says little about {recipe.model}; "
        "name other tasks in `eval.tasks`."
    ]
