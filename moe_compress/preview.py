"""What can be said before any weight is read: what a checkpoint is, and what a recipe would make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.data import share
from moe_compress.calibrate.documents import require_local
from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.index import TensorIndex
from moe_compress.checkpoint.rewrite import dense_config
from moe_compress.checkpoint.source import Checkpoint, is_local, open_config, refuse_path, small_files
from moe_compress.compress.operation import Outlook
from moe_compress.compress.quantize.config import BUDGETS
from moe_compress.compress.quantize.step import QuantizeStep
from moe_compress.compress.surroundings import resolved
from moe_compress.errors import RecipeError, UnsupportedModelError, UsageError
from moe_compress.estimate import disk_needed, look_at_machine, memory_warnings, peaks, seconds, stages
from moe_compress.eval.cost import cost, stored_by_part
from moe_compress.health import NEEDED, routing_health
from moe_compress.manifest import describe_source
from moe_compress.measure import cost_figures
from moe_compress.models.layers import PACKED, SECTION, find_moe_layers
from moe_compress.models.skeleton import build_skeleton
from moe_compress.recipe import Recipe, check_tier, load_recipe
from moe_compress.steps import make_step
from moe_compress.text import format_bytes

NOTABLE_GROWTH = 1.02  # zero experts add a row each to the routers


def inspect(model: str, *, revision: str | None = None, scores: Path | None = None) -> dict[str, Any]:
    """A checkpoint's architecture, experts, parameters, bytes and FLOPs per token, from its configuration alone.

    With the scores of this model, `routing` says how healthy its routing is (see `health`).
    """
    if revision is not None and (model == "reference" or Path(model).expanduser().is_dir()):
        raise UsageError(f"`--revision` has no effect: {model} is no Hub id; leave it out.")
    config, index = open_config(model, revision, quantized=True)
    tiers = [_what_loads_it(config)]
    estimate = "estimated" if _quantization(config) is None else "estimated as if it were not quantized"
    config = dense_config(config)
    layers = find_moe_layers(build_skeleton(config))
    figures = cost(config, stored_bytes=index.nbytes if index is not None else None)
    text: Any = config.get_text_config()
    bytes_per_param = figures.stored_bytes / max(1, figures.total_params)
    estimated = {part: round(count * bytes_per_param) for part, count in figures.params.items()}
    stored = stored_by_part(config, index) if index is not None else estimated
    routing = {}
    if scores is not None:
        measured = Scores.load(scores, only=lambda name: name in NEEDED)
        require_same_model(measured, *_revision_of(model, revision, config, index), scores)
        each = stored.get("routed_experts", 0) / sum(layer.num_experts for layer in layers)
        routing = {"routing": routing_health(measured, text.num_hidden_layers, each)}
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
        "bytes": stored,
        "bytes_are": "measured" if index is not None else estimate,
        "stored_bytes": figures.stored_bytes,
        "flops_per_token": figures.prefill_flops,
        "context": figures.context,
        "kv_bytes_per_token": figures.kv_bytes_per_token,
        "notes": list(figures.notes),
        "tiers": tiers,
    } | routing


def _what_loads_it(config: Any) -> str:
    """The tier that a checkpoint is of, and what it takes to load it."""
    if (section := getattr(config, SECTION, None)) is not None:
        packed = ", its experts packed" if PACKED in section else ""
        return f"plugin: it needs this package to load{packed}: `import moe_compress`, or trust_remote_code=True."
    quantization = _quantization(config)
    if quantization is None:
        return "stock: plain transformers loads it; pruning to one expert count for all layers keeps it so."
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return f"stock: plain transformers loads it with what it needs for `{method}`; it is no source to compress."


def _quantization(config: Any) -> Any:
    """What transformers' own quantization of the checkpoint is set to, if it has one."""
    found = (getattr(part, "quantization_config", None) for part in (config, config.get_text_config()))
    return next((one for one in found if one is not None), None)


def plan(
    recipe: Recipe,
    *,
    scores: Path | None = None,
    keep_steps: bool = False,
    device: str = "auto",
    clocked_at: Path | None = None,
) -> dict[str, Any]:
    """What each step would do, the sizes it leads to, and what the run would take.

    With scores, the first step's experts are named; without, only counts are known. Reads no weights. `warnings` are
    sentences about what may not be as it seems. With `clocked_at`, a place on the disk that the run would use, the
    machine is looked at for two seconds and `time` says how long the run would last.
    """
    config, index, warnings = _plannable(recipe)
    before = cost(config, stored_bytes=index.nbytes if index is not None else None)
    warnings, measured = [*warnings, *task_warnings(recipe)], None
    if scores is not None:
        measured = Scores.load(scores)
        require_same_model(measured, *_revision_of(recipe.model, recipe.revision, config, index), scores)
        warnings += [
            f"the scores in {scores} were measured with other calibration settings: {difference}."
            for difference in calibration_differences(measured, recipe.calibration)
        ]
    warnings += tier_warnings(recipe)
    planned, outlooks = look_ahead(recipe, config, index, scores=measured)
    warnings += step_warnings(planned, outlooks)
    after = outlooks[-1]
    predicted = cost(after.config).to_dict()
    predicted |= {"stored_bytes": after.stored_bytes, "active_bytes_per_token": after.active_bytes}
    figures = [cost_figures(costs) for costs in (before.to_dict(), predicted)]
    device = resolved(device)
    found = stages(recipe, outlooks, device)
    taken = {"memory": peaks(found)}
    warnings += memory_warnings(taken["memory"], device)
    if clocked_at is not None:
        batch = recipe.calibration.batch_size * recipe.calibration.sequence_length
        taken["time"] = seconds(found, look_at_machine(clocked_at, outlooks[0].size, batch, device))
    return {
        "model": recipe.model,
        "tier": recipe.export.tier,
        "steps": planned,
        "baseline": figures[0] | {"bytes_by_part": dict(outlooks[0].parts)},
        "predicted": figures[1] | {"bytes_by_part": dict(after.parts)},
        "disk_needed": disk_needed(recipe, outlooks, found, keep_steps=keep_steps),
        "warnings": warnings,
    } | taken


def look_ahead(
    recipe: Recipe, config: Any, index: TensorIndex | None = None, *, scores: Scores | None = None
) -> tuple[list[dict[str, Any]], list[Outlook]]:
    """What every step would do, and the outlook before the first and after each; `scores` are the first step's.

    Raises `UsageError` when a step cannot be, `UnsupportedModelError` when the tier does not hold this family.
    """
    figures = cost(config, stored_bytes=index.nbytes if index is not None else None)
    if index is not None:
        parts = stored_by_part(config, index)
    else:
        scale = figures.stored_bytes / figures.total_params
        parts = {part: round(count * scale) for part, count in figures.params.items() if count}
    original = _checkpoint(recipe.model, recipe.revision, config, index) if index is not None else None
    outlooks = [Outlook(config, figures.stored_bytes, figures.active_bytes_per_token, scores, parts, original)]
    planned = []
    for step in recipe.steps:
        entry, after = make_step(step).preview(outlooks[-1], recipe.export.tier)
        planned.append(entry)
        outlooks.append(after)
    return planned, outlooks


def _plannable(recipe: Recipe) -> tuple[PretrainedConfig, TensorIndex | None, list[str]]:
    """`open_config`, and of a quantized model without its weights what it would be unquantized, with a warning."""
    try:
        return *open_config(recipe.model, recipe.revision), []
    except UnsupportedModelError as error:
        config, index = open_config(recipe.model, recipe.revision, quantized=True)
        if index is not None or _quantization(config) is None:
            raise
        return dense_config(config), None, [f"{error} Sizes are those of such a model."]


def sweep(recipe: Recipe, scores: Path, setting: str, values: Sequence[float]) -> list[dict[str, Any]]:
    """The frontier of the recipe's quantize step: its best allocation for each value of the budget `setting`.

    Whatever the recipe says of bits and budgets gives way to it. Only the scores decide, nothing is read of the
    weights. Each entry has the budget, the bits and bytes it leads to, and the predicted loss with the bound that
    proves it, or why it cannot be met. Raises `UsageError` when the recipe's first step is no quantize step.
    """
    if not recipe.steps or recipe.steps[0].op != "quantize":
        raise UsageError("--sweep needs a recipe whose first step is `quantize`.")
    if setting not in BUDGETS:
        raise UsageError(f"--sweep needs one of the budgets of `quantize`: {', '.join(BUDGETS)}.")
    config, index = open_config(recipe.model, recipe.revision)
    figures = cost(config, stored_bytes=index.nbytes if index is not None else None)
    measured = Scores.load(scores)
    require_same_model(measured, *_revision_of(recipe.model, recipe.revision, config, index), scores)
    before = Outlook(config, figures.stored_bytes, figures.active_bytes_per_token, measured)
    found = []
    for value in values:
        step = make_step(_with_budget(recipe, setting, value).steps[0])
        assert isinstance(step, QuantizeStep)
        found.append({setting: value} | step.point(before, recipe.export.tier))
    return found


def _with_budget(recipe: Recipe, setting: str, value: float) -> Recipe:
    """The recipe with this budget and no other in its first step."""
    given = recipe.model_dump(exclude_unset=True)
    first, *rest = given["steps"]
    kept = {key: value for key, value in first.items() if key not in ("bits", *BUDGETS)}
    budget = value if setting == "average_bits" else int(value)
    return load_recipe(given | {"steps": [kept | {setting: budget}, *rest]})


def _revision_of(
    model: str, revision: str | None, config: Any, index: TensorIndex | None
) -> tuple[str | None, str | None]:
    """What `require_same_model` compares: the commit of a Hub id, and the fingerprint of weights that are there."""
    if index is None:
        return small_files(model, revision)[1], None
    checkpoint = _checkpoint(model, revision, config, index)
    fingerprint: str = describe_source(checkpoint)["fingerprint"]
    return checkpoint.revision, fingerprint


def _checkpoint(model: str, revision: str | None, config: Any, index: TensorIndex) -> Checkpoint:
    folder, commit = small_files(model, revision)
    return Checkpoint(folder, config, model, commit, index)


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


def foresee(recipe: Recipe) -> list[str]:
    """Warnings about what the recipe would do to its model, if that lies on this disk; raises what `run` refuses."""
    require_paths(recipe)
    if not is_local(recipe.model):
        return []
    config, index = open_config(recipe.model, recipe.revision)
    return [*task_warnings(recipe), *step_warnings(*look_ahead(recipe, config, index))]


def require_paths(recipe: Recipe) -> None:
    """Raise `UsageError` or `UnknownDataError` where model, calibration or a step name a path and nothing is there."""
    refuse_path(recipe.model)
    for part in recipe.calibration.parts:
        require_local(part)
    for step in recipe.steps:
        make_step(step).check_paths()


def step_warnings(planned: Sequence[Mapping[str, Any]], outlooks: Sequence[Outlook]) -> list[str]:
    """What the steps have to say of their settings, and where they make the checkpoint larger; one outlook more."""
    said = [f"steps.{index}.{text}" for index, entry in enumerate(planned) for text in entry.get("warnings", ())]
    for index, (before, after) in enumerate(pairwise(outlooks)):
        if after.stored_bytes > NOTABLE_GROWTH * before.stored_bytes:
            sizes = f"{format_bytes(before.stored_bytes)} -> {format_bytes(after.stored_bytes)}"
            said.append(f"steps.{index} makes the checkpoint larger: {sizes}.")
    return said


def tier_warnings(recipe: Recipe) -> list[str]:
    """Why the result could not be written in the recipe's tier, a sentence for each reason."""
    try:
        check_tier(recipe)
    except RecipeError as error:
        return [f"{problem.path}: {problem.message}." for problem in error.problems]
    return []


def task_warnings(recipe: Recipe) -> list[str]:
    """A sentence where evaluation tasks say nothing about this model."""
    own = [task for task in recipe.eval.tasks if task == "reference" or task.startswith("reference_")]
    if recipe.model == "reference" or not own:
        return []
    return [
        f"the task `{own[0]}` asks for what the built-in model was trained on, so it says little about {recipe.model}; "
        "name other tasks in `eval.tasks`."
    ]
