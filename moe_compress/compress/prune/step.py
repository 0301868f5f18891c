"""`op: prune` as a step: score, plan, apply."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from moe_compress.calibrate.ablation import with_importance
from moe_compress.calibrate.agreement import AUDIT_FILE
from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.scores import ABLATION, Scores
from moe_compress.checkpoint.index import DTYPE_BITS
from moe_compress.checkpoint.record import Record, Target
from moe_compress.checkpoint.rewrite import LEDGER_FILE, rewrite
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress import scoring
from moe_compress.compress.demand import Demand, ablation_demand
from moe_compress.compress.operation import Outlook, Step
from moe_compress.compress.prune.apply import PruneChange, bank_of
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.compress.prune.judged import judged
from moe_compress.compress.prune.plan import PrunePlan, keep_count, plan_prune
from moe_compress.compress.surroundings import Surroundings
from moe_compress.eval.cost import cost
from moe_compress.models.layers import find_moe_layers, require_no_banks, routing_groups, with_count_everywhere
from moe_compress.models.skeleton import build_skeleton
from moe_compress.runtime.banks import Bank
from moe_compress.runtime.families import banked, causal_model
from moe_compress.verification.checks import require_coverage

TARGET_TOLERANCE = 0.02  # of the fraction of experts kept


class PruneStep(Step[PruneConfig]):
    """Drops experts."""

    @property
    def is_calibrated(self) -> bool:
        return True

    def at_random(self, seed: int) -> PruneStep:
        return PruneStep(self.config.model_copy(update={"criterion": "random", "seed": seed}))

    def preview(self, before: Outlook, tier: str) -> tuple[dict[str, Any], Outlook]:
        require_no_banks(before.config, "prune")
        if tier == "plugin" and (self.config.scope == "global" or self.config.replace is not None):
            causal_model(before.config.to_dict())
        layer = find_moe_layers(build_skeleton(before.config))[0]
        count = keep_count(
            self.config, num_experts=layer.num_experts, top_k=layer.top_k, **routing_limits(before.config)
        )
        after = self._outlook(before, layer.num_experts, count)
        entry: dict[str, Any] = {
            "op": "prune",
            "criterion": self.config.model_dump(mode="json")["criterion"],
            "keep": self.config.keep,
            "experts_per_layer": count,
            "summary": [f"{count} experts stay in each layer; `moe-compress score` tells which."],
        }
        if before.scores is None:
            return entry, after
        plan = self.plan(before.scores, before.config)
        found = plan.to_json()
        if self.config.replace is not None:
            banks = {layer.layer: bank_of(layer) for layer in plan.layers}
            after = before.resized(banked(before.config, layer.num_experts, banks))
            return entry | {"summary": found["summary"], "layers": found["layers"]}, after
        figures = cost(before.config)
        share = figures.params["routed_experts"] / figures.total_params
        stored = round(before.stored_bytes * (1 - share * (1 - plan.num_kept / plan.num_experts)))
        entry |= {"summary": found["summary"], "layers": found["layers"]}
        return entry, after.of_size(stored_bytes=stored)

    def demands(self, before: Outlook, after: Outlook, calibration: CalibrationConfig) -> list[Demand]:
        scored, *rest = super().demands(before, after, calibration)
        if self.config.criterion != ABLATION:
            return [scored, *rest]
        ablated = ablation_demand(before.size, calibration, self.config.ablation_samples)
        return [scored, ablated, *rest]

    def score(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Scores:
        scores = super().score(source, folder, around, title)
        if self.config.criterion != ABLATION or all(ABLATION in layer.statistics for layer in scores.layers):
            return scores
        tokens = scoring.calibration_data(source, around).tokens[: self.config.ablation_samples]
        everything = {layer.layer: range(layer.num_experts) for layer in scores.layers}
        losses = scoring.ablations(source, tokens, everything, folder / ABLATION, around, title)
        scores = with_importance(scores, losses)
        scores.save(folder)
        if len(tokens) > 1:
            found = judged(scores, losses, everything, [ABLATION], self.config.seed)
            write_json(folder / AUDIT_FILE, found | {"model": source.model_id, "revision": source.revision})
        shutil.rmtree(folder / ABLATION)
        return scores

    def score_settings(self) -> dict[str, Any]:
        return {"ablation_samples": self.config.ablation_samples} if self.config.criterion == ABLATION else {}

    def run(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Record:
        scores = self.score(source, folder / "scores", around, title)
        plan = self.plan(scores, source.config)
        write_json(folder / "plan.json", plan.to_json())
        record = self._record(plan, scores, dropped_bytes(plan, LayerStream(source, around.device)))
        require_coverage(record)
        self.apply(plan, source, folder / "checkpoint", around, title, scores)
        return record

    def plan(self, scores: Scores, config: Any) -> PrunePlan:
        """Choose the experts to keep."""
        text = config.get_text_config()
        return plan_prune(self.config, scores, num_decoder_layers=text.num_hidden_layers, **routing_limits(config))

    def apply(
        self, plan: PrunePlan, source: Checkpoint, folder: Path, around: Surroundings, title: str, scores: Scores
    ) -> None:
        """Write the checkpoint that a plan makes of `source`, unless it is complete already."""
        if (folder / LEDGER_FILE).exists():
            return
        with around.progress.stage(f"{title}: apply", source.config.get_text_config().num_hidden_layers) as stage:
            rewrite(
                source,
                folder,
                PruneChange(plan, scores),
                max_shard_bytes=around.max_shard_bytes,
                device=around.device,
                stage=stage,
            )

    def _outlook(self, before: Outlook, num_experts: int, count: int) -> Outlook:
        """What the step leads to when each layer keeps `count` experts."""
        if self.config.replace is not None:
            layers = [layer.layer for layer in find_moe_layers(build_skeleton(before.config))]
            slots = tuple(expert if expert < count else None for expert in range(num_experts))
            return before.resized(banked(before.config, num_experts, dict.fromkeys(layers, Bank(count, slots))))
        return before.resized(with_count_everywhere(before.config, count))

    def _record(self, plan: PrunePlan, scores: Scores, dropped: int) -> Record:
        largest = max(layer.num_experts for layer in plan.layers)
        multiple = self.config.multiple_of
        # to the nearest count, then to the nearest multiple; a little more for the division itself
        rounding = (0.5 + (0.5 * multiple if multiple > 1 else 0)) / largest + 1e-9
        config = self.config.model_dump(mode="json")
        kept = {(layer.layer, expert) for layer in plan.layers for expert in layer.keep}
        return Record(
            op="prune",
            config=config,
            label=config["criterion"],
            dropped_bytes=dropped,
            targets=[
                Target(
                    "share of experts kept",
                    plan.num_asked / plan.num_experts,
                    plan.num_kept / plan.num_experts,
                    max(TARGET_TOLERANCE, rounding),
                    shown=".1%",
                )
            ],
            coverage=scores.summary(),
            calibration=scores.fingerprint,
            starved_kept=[pair for pair in scores.starved if pair in kept],
            starved_dropped=[pair for pair in scores.starved if pair not in kept],
        )


def routing_limits(config: Any) -> dict[str, Any]:
    """What a router's groups ask of a plan."""
    return {
        "num_groups": routing_groups(config),
        "groups_per_token": getattr(config.get_text_config(), "topk_group", None),
    }


def dropped_bytes(plan: PrunePlan, stream: LayerStream) -> int:
    """Stored bytes of the experts and router rows that a plan drops, less those of constants; from the headers."""
    total = 0
    for layer in plan.layers:
        moe = stream.moe_layers[layer.layer]
        tensors = {name: (tensor, 0) for name, tensor in moe.expert_tensors().items()}
        if plan.config.replace is None:
            tensors |= moe.router_tensors()
        else:
            down = next(name for name in tensors if name.endswith("down_proj"))
            width = moe.width * DTYPE_BITS[stream.stored_dtypes[f"{moe.block_name}.{down}"]] // 8
            total -= width * (moe.num_experts - len(layer.keep))
        for name, (tensor, dimension) in tensors.items():
            bits = DTYPE_BITS[stream.stored_dtypes[f"{moe.block_name}.{name}"]]
            total += tensor.numel() // tensor.shape[dimension] * bits // 8 * (moe.num_experts - len(layer.keep))
    return total
