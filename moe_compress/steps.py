"""One step of a recipe: score, plan, apply, from a checkpoint to a checkpoint folder; each part is kept and reused.

FOLDER/scores/       what calibration measured
FOLDER/plan.json     what happens to every expert
FOLDER/checkpoint/   the new checkpoint
FOLDER/step.json     what was done; there only when the step is complete
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.data import Calibration, load_calibration
from moe_compress.calibrate.gradients import channel_gradients
from moe_compress.calibrate.scores import Scores
from moe_compress.calibrate.sweep import collect
from moe_compress.checkpoint.index import DTYPE_BITS
from moe_compress.checkpoint.rewrite import LEDGER_FILE, Change, open_rewritten, rewrite
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.prune.apply import PruneChange
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.compress.prune.plan import PrunePlan, plan_prune
from moe_compress.compress.quantize.apply import QuantizeChange, scale_dtype_of
from moe_compress.compress.quantize.config import BUDGETS, QuantizeConfig
from moe_compress.compress.quantize.plan import (
    SHAPE_BYTES,
    ExpertShapes,
    QuantizePlan,
    measured_settings,
    plan_quantize,
    with_group_size,
)
from moe_compress.compress.quantize.sensitivity import ReducedRouters, Sensitivity
from moe_compress.compress.quantize.shapes import expert_shapes, linear_layers
from moe_compress.compress.quantize.storage import linear_savings, noted_bytes, require_quantizable
from moe_compress.manifest import describe_source
from moe_compress.models.layers import MoELayer, routing_groups
from moe_compress.progress import Progress
from moe_compress.verification.checks import check_coverage, raise_on_failure


@dataclass(frozen=True)
class Surroundings:
    """What every step needs besides its own settings."""

    calibration: CalibrationConfig
    max_shard_bytes: int
    device: str
    progress: Progress
    tier: str = "stock"
    data: Calibration | None = None  # when it was read before


def read_calibration(folder: Path, config: Any, calibration: CalibrationConfig) -> Calibration:
    """The calibration tokens for the model whose tokenizer lies in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return load_calibration(calibration, tokenizer, max_length=longest)


def score_step(
    source: Checkpoint, folder: Path, around: Surroundings, title: str, quantize: QuantizeConfig | None = None
) -> Scores:
    """Measure the experts of `source` on the calibration tokens, or read what was measured before.

    `quantize` also measures what each of its options costs.
    """
    if (folder / "scores.json").exists():
        return Scores.load(folder)
    data = calibration_data(source, around)
    fingerprint: dict[str, Any] = {"source": describe_source(source), "tokens": data.fingerprint, "data": data.sources}
    fingerprint["seed"] = around.calibration.seed
    stream = LayerStream(source, around.device)
    measurement = None
    if quantize is not None and quantize.has_budget:
        quantize = with_group_size(quantize, _shapes(stream))
        fingerprint["quantize"] = measured_settings(quantize)
        weights = None
        if quantize.cost == "fisher":
            with around.progress.stage(f"{title}: gradients", 2 * len(stream.layers)) as stage:
                weights = channel_gradients(
                    stream,
                    data.tokens[: quantize.gradient_samples],
                    batch_size=around.calibration.batch_size,
                    folder=folder,
                    stage=stage,
                )
            stream = LayerStream(source, around.device)
        measurement = sensitivities(quantize, source, stream, weights)
    with around.progress.stage(f"{title}: score", len(stream.layers)) as stage:
        return collect(
            stream,
            data.tokens,
            batch_size=around.calibration.batch_size,
            folder=folder,
            fingerprint=fingerprint,
            min_tokens_per_expert=around.calibration.min_tokens_per_expert,
            stage=stage,
            measurement=measurement,
        )


def calibration_data(source: Checkpoint, around: Surroundings) -> Calibration:
    """The calibration tokens, by the checkpoint's own tokenizer, unless they were read before."""
    return around.data or read_calibration(source.folder, source.config, around.calibration)


def is_calibrated(step: PruneConfig | QuantizeConfig) -> bool:
    """Whether a step runs calibration tokens through the model."""
    return isinstance(step, PruneConfig) or step.has_budget or step.method == "gptq"


def plan_step(step: PruneConfig, scores: Scores, source: Checkpoint) -> PrunePlan:
    """Choose the experts to keep."""
    text: Any = source.config.get_text_config()
    return plan_prune(
        step,
        scores,
        num_decoder_layers=text.num_hidden_layers,
        num_groups=routing_groups(source.config),
        groups_per_token=getattr(text, "topk_group", None),
    )


def run_step(
    step: PruneConfig | QuantizeConfig, source: Checkpoint, folder: Path, around: Surroundings, title: str
) -> Checkpoint:
    """Score, plan and apply one step, going on where an earlier run of it stopped; returns the new checkpoint."""
    checkpoint = folder / "checkpoint"
    if not (folder / "step.json").exists():
        if isinstance(step, QuantizeConfig):
            write_json(folder / "step.json", quantize_step(step, source, folder, around, title))
            return open_rewritten(checkpoint, source)
        scores = score_step(source, folder / "scores", around, title)
        plan = plan_step(step, scores, source)
        write_json(folder / "plan.json", plan.to_json())
        stream = LayerStream(source, around.device)
        dropped = dropped_bytes(plan, stream)
        done = record(plan, scores, dropped)
        require_coverage(done)
        apply(plan, source, checkpoint, around, title)
        write_json(folder / "step.json", done)
    return open_rewritten(checkpoint, source)


def require_coverage(done: dict[str, Any]) -> None:
    """Raise `VerificationError` when what this step is about to write would fail the check `coverage`."""
    coverage = check_coverage({"steps": [done]})
    raise_on_failure({"coverage": asdict(coverage)})


def apply(plan: PrunePlan, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> None:
    """Write the checkpoint that a plan makes of `source`, unless it is complete already."""
    if (folder / LEDGER_FILE).exists():
        return
    with around.progress.stage(f"{title}: apply", source.config.get_text_config().num_hidden_layers) as stage:
        rewrite(
            source,
            folder,
            PruneChange(plan),
            max_shard_bytes=around.max_shard_bytes,
            device=around.device,
            stage=stage,
        )


def run_identity(source: Checkpoint, folder: Path, around: Surroundings) -> Checkpoint:
    """Stream the checkpoint through its layers unchanged."""
    checkpoint = folder / "checkpoint"
    if not (checkpoint / LEDGER_FILE).exists():
        with around.progress.stage("identity", source.config.get_text_config().num_hidden_layers) as stage:
            rewrite(
                source,
                checkpoint,
                Change(),
                max_shard_bytes=around.max_shard_bytes,
                device=around.device,
                stage=stage,
            )
    return open_rewritten(checkpoint, source)


def record(plan: PrunePlan, scores: Scores, dropped: int) -> dict[str, Any]:
    """What a finished prune step did, for the manifest and the checks."""
    largest = max(layer.num_experts for layer in plan.layers)
    multiple = plan.config.multiple_of
    return {
        "op": "prune",
        "config": plan.config.model_dump(mode="json"),
        "keep": {str(layer.layer): list(layer.keep) for layer in plan.layers},
        "protected": {str(layer.layer): list(layer.protected) for layer in plan.layers if layer.protected},
        "starved": scores.starved,
        "coverage": scores.summary(),
        "calibration": scores.fingerprint,
        "dropped_bytes": dropped,
        "target": {
            "asked": plan.num_asked / plan.num_experts,
            "achieved": plan.num_kept / plan.num_experts,
            # to the nearest count, then to the nearest multiple; a little more for the division itself
            "rounding": (0.5 + (0.5 * multiple if multiple > 1 else 0)) / largest + 1e-9,
        },
    }


def dropped_bytes(plan: PrunePlan, stream: LayerStream) -> int:
    """Stored bytes of the experts and router rows that a plan drops, worked out from the source's headers."""
    total = 0
    for layer in plan.layers:
        moe = stream.moe_layers[layer.layer]
        tensors = {name: (tensor, 0) for name, tensor in moe.expert_tensors().items()} | moe.router_tensors()
        for name, (tensor, dimension) in tensors.items():
            bits = DTYPE_BITS[stream.stored_dtypes[f"{moe.block_name}.{name}"]]
            total += tensor.numel() // tensor.shape[dimension] * bits // 8 * (moe.num_experts - len(layer.keep))
    return total


def load_record(folder: Path) -> dict[str, Any]:
    """What `record` said about a finished step."""
    content: dict[str, Any] = json.loads((folder / "step.json").read_text(encoding="utf-8"))
    return content


def sensitivities(
    config: QuantizeConfig, source: Checkpoint, stream: LayerStream, channel_weights: dict[int, Tensor] | None
) -> Callable[[MoELayer], Sensitivity]:
    """Makes what measures the costs of a layer's options; `channel_weights` are those of `cost: fisher`."""
    routers = ReducedRouters(source.config) if config.allow_drop else None
    scale_dtype = scale_dtype_of(stream)
    weights = channel_weights or {}
    return lambda moe: Sensitivity(config, moe, scale_dtype, routers=routers, channel_weights=weights.get(moe.layer))


def quantize_step(
    config: QuantizeConfig, source: Checkpoint, folder: Path, around: Surroundings, title: str
) -> dict[str, Any]:
    """Score (where a budget needs costs), plan and apply a quantize step; what `step.json` says of it."""
    stream = LayerStream(source, around.device)
    config = with_group_size(config, _shapes(stream))
    require_quantizable(config, stream, around.tier)
    folder.mkdir(parents=True, exist_ok=True)
    scores = score_step(source, folder / "scores", around, title, config) if config.has_budget else None
    data = calibration_data(source, around) if is_calibrated(config) else None
    plan = plan_quantize_step(config, scores, source, stream, around.tier)
    write_json(folder / "plan.json", plan.to_json())
    change = QuantizeChange(
        plan,
        list(linear_layers(stream.layers, stream.moe_layers)),
        tier=around.tier,
        scale_dtype=scale_dtype_of(stream),
        tokens=data.tokens if data is not None and config.method == "gptq" else None,
        batch_size=around.calibration.batch_size,
        notes=folder / "pooled.json",
    )
    checkpoint = folder / "checkpoint"
    if not (checkpoint / LEDGER_FILE).exists():
        with around.progress.stage(f"{title}: apply", len(stream.layers)) as stage:
            rewrite(
                source,
                checkpoint,
                change,
                max_shard_bytes=around.max_shard_bytes,
                device=around.device,
                stage=stage,
            )
    saved = saved_bytes(plan, change, stream, around.tier)
    measured = {"source": describe_source(source), "tokens": data.fingerprint, "data": data.sources} if data else {}
    achieved: dict[str, float] = {"average_bits": plan.average_bits, "stored_bytes": source.index.nbytes - saved}
    if plan.allocation is not None:
        achieved["active_bytes"] = plan.allocation["active_bytes"]
    return {
        "op": "quantize",
        "config": config.model_dump(mode="json"),
        "keep": {str(layer.layer): list(layer.keep) for layer in plan.layers},
        "starved": scores.starved if scores else [],
        "pooled": change.pooled,
        "coverage": scores.summary() if scores else {"calibration_tokens": data.tokens.numel()} if data else {},
        "calibration": scores.fingerprint if scores else measured,
        "dropped_bytes": saved,
        "target": {
            "budgets": {name: value for name in BUDGETS if (value := getattr(config, name)) is not None},
            "achieved": achieved,
        },
    }


def plan_quantize_step(
    config: QuantizeConfig, scores: Scores | None, source: Checkpoint, stream: LayerStream, tier: str
) -> QuantizePlan:
    """Choose every expert's bits by the scores and the budget."""
    shapes = _shapes(stream)
    experts = sum(shape.num_experts * (shape.weights * shape.weight_bytes + shape.other_bytes) for shape in shapes)
    linears = sum(linear.part in config.parts for linear in linear_layers(stream.layers, stream.moe_layers))
    noted = SHAPE_BYTES * linears if tier == "stock" else 0
    return plan_quantize(
        config,
        shapes,
        scores,
        fixed_bytes=source.index.nbytes - experts - _linear_savings(config, stream) + noted,
        num_decoder_layers=len(stream.layers),
        num_groups=routing_groups(source.config),
        tier=tier,
    )


def saved_bytes(plan: QuantizePlan, change: QuantizeChange, stream: LayerStream, tier: str) -> int:
    """Bytes that the result is smaller by, worked out from the plan."""
    shapes = _shapes(stream)
    before = sum(shape.num_experts * (shape.weights * shape.weight_bytes + shape.other_bytes) for shape in shapes)
    saved = before - plan.expert_bytes + _linear_savings(plan.config, stream)
    return saved - noted_bytes(plan, len(change.linears), tier)


def _linear_savings(config: QuantizeConfig, stream: LayerStream) -> int:
    return linear_savings(config, linear_layers(stream.layers, stream.moe_layers), scale_dtype_of(stream))


def _shapes(stream: LayerStream) -> list[ExpertShapes]:
    return [expert_shapes(moe, stream.stored_dtypes) for moe in stream.moe_layers.values()]
