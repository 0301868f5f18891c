"""What can be said before any weight is read: what a checkpoint is, and what a recipe would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.rewrite import dense_config
from moe_compress.checkpoint.source import open_config
from moe_compress.compress.prune.plan import keep_count, plan_prune
from moe_compress.compress.quantize.config import QuantizeConfig
from moe_compress.compress.quantize.plan import check_shapes, plan_quantize
from moe_compress.compress.quantize.shapes import expert_shapes
from moe_compress.errors import UsageError
from moe_compress.eval.cost import Cost, cost
from moe_compress.measure import cost_figures
from moe_compress.models.layers import MoELayer, find_moe_layers, routing_groups, set_num_experts
from moe_compress.models.skeleton import build_skeleton
from moe_compress.recipe import Recipe
from moe_compress.runtime.families import causal_model

SPARE_DISK = 1.05  # of the weights, for what lies beside them


def inspect(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """A checkpoint's architecture, experts, parameters, bytes and FLOPs per token, from its configuration alone."""
    config, index = open_config(model, revision, trust_remote_code, quantized=True)
    config = dense_config(config)
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


def plan(recipe: Recipe, *, scores: Path | None = None) -> dict[str, Any]:
    """What each step would do, and the sizes it leads to.

    With scores, the first step's experts are named; without, only counts are known. Reads no weights.
    """
    config, index = open_config(recipe.model, recipe.revision, recipe.trust_remote_code)
    before = cost(config, stored_bytes=index.nbytes if index is not None else None)
    layers = find_moe_layers(build_skeleton(config))
    text: Any = config.get_text_config()
    num_experts, *counts_after = expert_counts(recipe, config, layers[0])
    planned = []
    for number, (step, after) in enumerate(zip(recipe.steps, counts_after, strict=True)):
        if isinstance(step, QuantizeConfig):
            planned.append(_plan_quantize(step, config, layers, before, scores, recipe.export.tier))
            continue
        entry: dict[str, Any] = {
            "op": step.op,
            "criterion": step.model_dump(mode="json")["criterion"],
            "keep": step.keep,
        }
        if scores is not None and number == 0:
            measured = Scores.load(scores)
            _require_same_layers(measured, {layer.layer: layer.num_experts for layer in layers}, scores)
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
        "disk_needed": disk_needed(recipe, config, before.stored_bytes),
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
            check_shapes(step, expert_shapes(layer, {}))
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


def disk_needed(recipe: Recipe, config: Any, source_bytes: int) -> int:
    """Bytes on disk at the worst moment.

    Two checkpoints when there are several steps or random baselines, and the float32 hidden states of all calibration
    tokens twice, entering and leaving a layer.
    """
    copies = 2 if len(recipe.steps) > 1 or recipe.eval.random_baselines else 1
    calibration = recipe.calibration
    tokens = calibration.num_samples * calibration.sequence_length if recipe.steps else 0
    hidden_size: int = config.get_text_config().hidden_size
    return round(source_bytes * copies * SPARE_DISK) + 2 * 4 * tokens * hidden_size


def _plan_quantize(
    step: QuantizeConfig, config: Any, layers: list[MoELayer], before: Cost, scores: Path | None, tier: str
) -> dict[str, Any]:
    """A quantize step with its widths where they are known: given, or chosen by the scores."""
    entry: dict[str, Any] = step.model_dump(mode="json", exclude_unset=True)
    if step.has_budget and scores is None:
        return entry | {"note": "the bits of every expert are chosen when its costs are measured"}
    dtype = {4: "F32", 2: "BF16"}[config.get_text_config().dtype.itemsize]
    shapes = [expert_shapes(layer, {}, dtype) for layer in layers]
    experts = sum(shape.num_experts * (shape.weights * shape.weight_bytes + shape.other_bytes) for shape in shapes)
    measured = None
    if scores is not None:
        measured = Scores.load(scores)
        _require_same_layers(measured, {layer.layer: layer.num_experts for layer in layers}, scores)
    found = plan_quantize(
        step,
        shapes,
        measured,
        fixed_bytes=before.stored_bytes - experts,
        num_decoder_layers=config.get_text_config().num_hidden_layers,
        num_groups=routing_groups(config),
        tier=tier,
    )
    return entry | {
        "average_bits_chosen": found.average_bits,
        "allocation": found.allocation,
        "layers": [
            {"layer": layer.layer, "num_experts": layer.num_experts, "keep": list(layer.keep), "bits": layer.options}
            for layer in found.layers
        ],
        "predicted_stored_bytes": before.stored_bytes - experts + found.expert_bytes,
    }


def _bytes_after(before: Cost, kept: float) -> int:
    share = before.params["routed_experts"] / before.total_params
    return round(before.stored_bytes * (1 - share * (1 - kept)))


def _require_same_layers(scores: Scores, layers: dict[int, int], folder: Path) -> None:
    if {layer.layer: layer.num_experts for layer in scores.layers} != layers:
        raise UsageError(f"the scores in {folder} were measured on another model; score this one first.")
