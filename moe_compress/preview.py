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
from moe_compress.compress.prune.plan import keep_count, plan_prune
from moe_compress.compress.quantize.config import BUDGETS, QuantizeConfig
from moe_compress.compress.quantize.plan import SHAPE_BYTES, QuantizePlan, check_shapes, plan_quantize, with_group_size
from moe_compress.compress.quantize.shapes import expert_shapes, linear_layers
from moe_compress.compress.quantize.storage import linear_savings, noted_bytes
from moe_compress.errors import UsageError
from moe_compress.eval.cost import Cost, cost, stored_by_part
from moe_compress.manifest import describe_source
from moe_compress.measure import cost_figures
from moe_compress.models.layers import MoELayer, decoder_layers, find_moe_layers, routing_groups, set_num_experts
from moe_compress.models.skeleton import build_skeleton
from moe_compress.recipe import Recipe
from moe_compress.runtime.families import causal_model

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
    layers = find_moe_layers(build_skeleton(config))
    text: Any = config.get_text_config()
    num_experts, *counts_after = expert_counts(recipe, config, layers[0])
    planned, warnings = [], task_warnings(recipe)
    measured = None
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
    for number, (step, after) in enumerate(zip(recipe.steps, counts_after, strict=True)):
        if isinstance(step, QuantizeConfig):
            planned.append(_plan_quantize(step, config, layers, before, measured, recipe.export.tier))
            continue
        entry: dict[str, Any] = {
            "op": step.op,
            "criterion": step.model_dump(mode="json")["criterion"],
            "keep": step.keep,
        }
        if measured is not None and number == 0:
            found = plan_prune(step, measured, num_decoder_layers=text.num_hidden_layers, **routing_limits(config))
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
    predicted = after_cost.to_dict() | {"stored_bytes": round(after_cost.stored_bytes * scale)}
    for entry in planned:
        predicted |= {key: entry[f"predicted_{key}"] for key in predicted if f"predicted_{key}" in entry}
    return {
        "model": recipe.model,
        "steps": planned,
        "baseline": cost_figures(before.to_dict()),
        "predicted": cost_figures(predicted),
        "disk_needed": disk_needed(recipe, config, before.stored_bytes, keep_steps=keep_steps),
        "warnings": warnings,
    }


def expert_counts(recipe: Recipe, config: Any, layer: MoELayer) -> list[int]:
    """Experts in a layer before the first step and after each one; `UsageError` when a step cannot be.

    Raises `UnsupportedModelError` when the tier `plugin` does not hold this family.
    """
    counts = [layer.num_experts]
    if recipe.export.tier == "plugin" and any(
        isinstance(step, QuantizeConfig) or step.scope == "global" for step in recipe.steps
    ):
        causal_model(config.to_dict())
    for step in recipe.steps:
        if isinstance(step, QuantizeConfig):
            shapes = [expert_shapes(layer, {})]
            check_shapes(with_group_size(step, shapes), shapes[0])
            counts.append(counts[-1])
            continue
        counts.append(keep_count(step, num_experts=counts[-1], top_k=layer.top_k, **routing_limits(config)))
    return counts


def routing_limits(config: Any) -> dict[str, Any]:
    """What a router's groups ask of a plan."""
    return {
        "num_groups": routing_groups(config),
        "groups_per_token": getattr(config.get_text_config(), "topk_group", None),
    }


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


def _plan_quantize(
    step: QuantizeConfig, config: Any, layers: list[MoELayer], before: Cost, measured: Scores | None, tier: str
) -> dict[str, Any]:
    """A quantize step with its widths where they are known: given, or chosen by the scores."""
    entry: dict[str, Any] = step.model_dump(mode="json", exclude_unset=True)
    if step.has_budget and measured is None:
        return entry | {"note": "the bits of every expert are chosen when its costs are measured"}
    step = with_group_size(step, [expert_shapes(layer, {}) for layer in layers])
    found, fixed_bytes = _quantize_plan(step, config, layers, before, measured, tier)
    stored = fixed_bytes + found.expert_bytes + noted_bytes(found, 0, tier)
    share = sum(layer.top_k for layer in layers) / sum(layer.num_experts for layer in layers)
    linears = _linear_savings(step, config, layers, tier)  # which every token reads
    experts = before.stored_bytes - fixed_bytes - linears
    active = before.active_bytes_per_token - linears - share * (experts - found.expert_bytes)
    return entry | {
        "average_bits_chosen": found.average_bits,
        "allocation": found.allocation,
        "layers": [
            {"layer": layer.layer, "num_experts": layer.num_experts, "keep": list(layer.keep), "bits": layer.options}
            for layer in found.layers
        ],
        "predicted_stored_bytes": stored,
        "predicted_active_bytes_per_token": round(active),
    }


def sweep(recipe: Recipe, scores: Path, setting: str, values: Sequence[float]) -> list[dict[str, Any]]:
    """The frontier of the recipe's quantize step: its best allocation for each value of the budget `setting`.

    Only the scores decide, nothing is read of the weights. Each entry has the budget, the bits and bytes it leads to,
    and the predicted loss with the bound that proves it. Raises `UsageError` when the recipe's first step is no
    quantize step, or a budget cannot be met.
    """
    step = recipe.steps[0] if recipe.steps else None
    if not isinstance(step, QuantizeConfig) or setting not in BUDGETS:
        raise UsageError(f"--sweep needs a first step `quantize` and one of its budgets ({', '.join(BUDGETS)}).")
    config, index = open_config(recipe.model, recipe.revision)
    before = cost(config, stored_bytes=index.nbytes if index is not None else None)
    layers = find_moe_layers(build_skeleton(config))
    measured = Scores.load(scores)
    entries = []
    for value in values:
        budget = dict.fromkeys(BUDGETS) | {"bits": None, setting: value if setting == "average_bits" else int(value)}
        chosen = with_group_size(step, [expert_shapes(layer, {}) for layer in layers]).model_copy(update=budget)
        found, fixed_bytes = _quantize_plan(chosen, config, layers, before, measured, recipe.export.tier)
        assert found.allocation is not None
        entries.append(
            {
                setting: value,
                "bits": found.average_bits,
                "stored": fixed_bytes + found.expert_bytes + noted_bytes(found, 0, recipe.export.tier),
                "dropped_experts": found.num_dropped,
                "predicted_loss": found.allocation["loss"],
                "relaxation_bound": found.allocation["relaxation_bound"],
                "optimal": found.allocation["optimal"],
            }
        )
    return entries


def _quantize_plan(
    step: QuantizeConfig, config: Any, layers: list[MoELayer], before: Cost, measured: Scores | None, tier: str
) -> tuple[QuantizePlan, int]:
    """The plan of a quantize step, and the bytes of everything else once it is done."""
    text = config.get_text_config()
    shapes = [expert_shapes(layer, {}, {4: "F32", 2: "BF16"}[text.dtype.itemsize]) for layer in layers]
    experts = sum(shape.num_experts * (shape.weights * shape.weight_bytes + shape.other_bytes) for shape in shapes)
    fixed_bytes = before.stored_bytes - experts - _linear_savings(step, config, layers, tier)
    found = plan_quantize(
        step,
        shapes,
        measured,
        fixed_bytes=fixed_bytes,
        num_decoder_layers=text.num_hidden_layers,
        num_groups=routing_groups(config),
        tier=tier,
    )
    return found, fixed_bytes


def _linear_savings(step: QuantizeConfig, config: Any, layers: list[MoELayer], tier: str) -> int:
    """Bytes that quantized linear layers outside the experts save, less what is noted beside them."""
    _, decoder = decoder_layers(build_skeleton(config))
    found = linear_layers(decoder, {layer.layer: layer for layer in layers})
    linears = [linear for linear in found if linear.part in step.parts]
    noted = SHAPE_BYTES * len(linears) if tier == "stock" else 0
    return linear_savings(step, linears, config.get_text_config().dtype) - noted


def _bytes_after(before: Cost, kept: float) -> int:
    share = before.params["routed_experts"] / before.total_params
    return round(before.stored_bytes * (1 - share * (1 - kept)))


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
