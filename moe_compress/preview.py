"""What can be said before any weight is read: what a checkpoint is, and what a recipe would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.source import open_config
from moe_compress.compress.prune.plan import keep_count, plan_prune
from moe_compress.errors import UsageError
from moe_compress.eval.cost import Cost, cost, stored_by_part
from moe_compress.measure import cost_figures
from moe_compress.models.layers import MoELayer, find_moe_layers, routing_groups, set_num_experts
from moe_compress.models.skeleton import build_skeleton
from moe_compress.recipe import Recipe

SPARE_DISK = 1.05  # of the weights, for what lies beside them


def inspect(model: str, *, revision: str | None = None) -> dict[str, Any]:
    """A checkpoint's architecture, experts, parameters, bytes and FLOPs per token, from its configuration alone."""
    config, index = open_config(model, revision)
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


def plan(recipe: Recipe, *, scores: Path | None = None) -> dict[str, Any]:
    """What each step would do, and the sizes it leads to.

    With scores, the first step's experts are named; without, only counts are known. Reads no weights.
    """
    config, index = open_config(recipe.model, recipe.revision)
    before = cost(config, stored_bytes=index.nbytes if index is not None else None)
    layers = find_moe_layers(build_skeleton(config))
    text: Any = config.get_text_config()
    num_experts, *counts_after = expert_counts(recipe, config, layers[0])
    planned = []
    for number, (step, after) in enumerate(zip(recipe.steps, counts_after, strict=True)):
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
    return {
        "model": recipe.model,
        "steps": planned,
        "baseline": cost_figures(before.to_dict()),
        "predicted": cost_figures(after_cost.to_dict() | {"stored_bytes": round(after_cost.stored_bytes * scale)}),
        "disk_needed": disk_needed(recipe, config, before.stored_bytes),
    }


def expert_counts(recipe: Recipe, config: Any, layer: MoELayer) -> list[int]:
    """Experts in a layer before the first step and after each one; `UsageError` when a step cannot be."""
    counts = [layer.num_experts]
    for step in recipe.steps:
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


def _bytes_after(before: Cost, kept: float) -> int:
    share = before.params["routed_experts"] / before.total_params
    return round(before.stored_bytes * (1 - share * (1 - kept)))


def _require_same_layers(scores: Scores, layers: dict[int, int], folder: Path) -> None:
    if {layer.layer: layer.num_experts for layer in scores.layers} != layers:
        raise UsageError(f"the scores in {folder} were measured on another model; score this one first.")
