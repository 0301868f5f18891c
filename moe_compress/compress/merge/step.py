"""`op: merge` as a step: score, plan, apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.record import Record, Target
from moe_compress.checkpoint.rewrite import LEDGER_FILE, rewrite
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress import scoring
from moe_compress.compress.merge.apply import MergeChange, bank_of, needs_tokens
from moe_compress.compress.merge.config import MergeConfig
from moe_compress.compress.merge.measure import MeanOutputs
from moe_compress.compress.merge.plan import MergePlan, difference_ranks, group_count, plan_merge, stored_bytes
from moe_compress.compress.operation import Outlook, Step
from moe_compress.compress.prune.step import routing_limits
from moe_compress.compress.quantize.plan import ExpertShapes
from moe_compress.compress.quantize.sizes import Sizes
from moe_compress.compress.surroundings import Surroundings
from moe_compress.models.layers import require_no_banks, with_count_everywhere
from moe_compress.runtime.banks import Bank
from moe_compress.runtime.families import banked, causal_model
from moe_compress.verification.checks import require_coverage

TARGET_TOLERANCE = 0.02  # of the share of groups, or of bytes


class MergeStep(Step[MergeConfig]):
    """Puts experts together; `plan` and `apply` are public so that settings can be compared on the same scores."""

    @property
    def is_calibrated(self) -> bool:
        return True

    def preview(self, before: Outlook, tier: str) -> tuple[dict[str, Any], Outlook]:
        require_no_banks(before.config, "merge")
        if self.config.keeps_router:
            causal_model(before.config.to_dict())
        sizes = Sizes.of_config(before.config, before.stored_bytes)
        shape, limits = sizes.shapes[0], routing_limits(before.config)
        count = group_count(self.config, num_experts=shape.num_experts, top_k=shape.top_k, **limits)
        entry: dict[str, Any] = {
            "op": "merge",
            "grouping": self.config.grouping,
            "keep": self.config.keep,
            "experts_per_layer": count,
            "summary": [f"{count} groups in each layer; `moe-compress score` tells of which experts."],
        }
        plan = None
        if before.scores is not None:
            plan = self.plan(before.scores, sizes, before.config)
            found = plan.to_json()
            entry |= {"summary": found["summary"], "layers": found["layers"]}
        return entry, self._outlook(before, sizes, count, plan)

    def score(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Scores:
        measurement = MeanOutputs if self.config.grouping == "hc" else None
        settings = self.score_settings()
        return scoring.score(source, folder, around, title, measurement=measurement, settings=settings)

    def score_settings(self) -> dict[str, Any]:
        return {"mean_outputs": True} if self.config.grouping == "hc" else {}

    def run(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Record:
        scores = self.score(source, folder / "scores", around, title)
        sizes = Sizes.of_stream(LayerStream(source, around.device))
        plan = self.plan(scores, sizes, source.config)
        write_json(folder / "plan.json", plan.to_json())
        record = self._record(plan, scores, sizes)
        require_coverage(record)
        self.apply(plan, source, folder / "checkpoint", around, title)
        return record

    def plan(self, scores: Scores, sizes: Sizes, model_config: Any) -> MergePlan:
        """Choose the groups of every layer."""
        layers = model_config.get_text_config().num_hidden_layers
        limits = routing_limits(model_config)
        return plan_merge(self.config, scores, sizes.shapes, num_decoder_layers=layers, **limits)

    def apply(self, plan: MergePlan, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> None:
        """Write the checkpoint that a plan makes of `source`, unless it is complete already."""
        if (folder / LEDGER_FILE).exists():
            return
        tokens = scoring.calibration_data(source, around).tokens if needs_tokens(plan) else None
        with around.progress.stage(f"{title}: apply", source.config.get_text_config().num_hidden_layers) as stage:
            rewrite(
                source,
                folder,
                MergeChange(plan, tokens, around.calibration.batch_size),
                max_shard_bytes=around.max_shard_bytes,
                device=around.device,
                stage=stage,
            )

    def _outlook(self, before: Outlook, sizes: Sizes, count: int, plan: MergePlan | None) -> Outlook:
        """What the step leads to, from the plan or from the number of groups alone."""
        shape = sizes.shapes[0]
        if not self.config.keeps_router:
            return before.resized(with_count_everywhere(before.config, count))
        if plan is not None:
            banks = {layer.layer: bank_of(layer) for layer in plan.layers}
        else:
            banks = {shape.layer: self._outline(shape, count) for shape in sizes.shapes}
        return before.resized(banked(before.config, shape.num_experts, banks))

    def _outline(self, shape: ExpertShapes, count: int) -> Bank:
        """A layer's bank of `count` experts as far as it is known without scores: its sizes."""
        slots = tuple(min(expert, count - 1) for expert in range(shape.num_experts))
        ranks = {
            part: (0,) * count + (rank,) * (shape.num_experts - count)
            for part, rank in difference_ranks(self.config, shape, count).items()
        }
        return Bank(count, slots, ranks)

    def _record(self, plan: MergePlan, scores: Scores, sizes: Sizes) -> Record:
        shapes = sizes.shapes
        before, after = sizes.expert_bytes, stored_bytes(plan, shapes)
        multiple = self.config.multiple_of
        rounding = (0.5 + (0.5 * multiple if multiple > 1 else 0)) / max(s.num_experts for s in shapes) + 1e-9
        targets = [
            Target(
                "share of distinct experts",
                plan.num_asked / plan.num_experts,
                plan.num_groups / plan.num_experts,
                max(TARGET_TOLERANCE, rounding),
                shown=".1%",
            )
        ]
        differences = self.config.keep_differences
        if differences is not None and differences.expert_bytes is not None:
            whole = sum(s.num_experts * (s.weights * s.weight_bytes) for s in shapes)
            routers = sum(s.num_experts * (s.other_bytes - s.bias_bytes) for s in shapes)
            share = (after - routers) / whole
            asked = differences.expert_bytes
            targets.append(Target("share of expert bytes", asked, share, TARGET_TOLERANCE, at_most=True, shown=".1%"))
        leads = {(layer.layer, expert) for layer in plan.layers for expert in layer.dominants}
        others = [pair for pair in scores.starved if pair not in leads]
        return Record(
            op="merge",
            config=self.config.model_dump(mode="json"),
            label=label(self.config),
            dropped_bytes=before - after,
            targets=targets,
            coverage=scores.summary(),
            calibration=scores.fingerprint,
            starved_kept=[pair for pair in scores.starved if pair in leads],
            starved_dropped=[] if differences is not None else others,
            pooled=others if differences is not None else [],
        )


def label(config: MergeConfig) -> str:
    """The grouping, and what becomes of the members, in a few words."""
    if config.keep_differences is not None:
        return f"{config.grouping}, keep {config.keep}, differences"
    aligned = f"aligned by {config.align}" if config.align else "not aligned"
    return f"{config.grouping}, keep {config.keep}, {aligned}" + (", router kept" if config.keeps_router else "")
