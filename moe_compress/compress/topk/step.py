"""`op: topk` as a step: measure what fewer experts cost where layers are to differ, plan, apply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.record import Record, Target
from moe_compress.checkpoint.rewrite import LEDGER_FILE, rewrite
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress import scoring
from moe_compress.compress.operation import Outlook, Step
from moe_compress.compress.surroundings import Surroundings
from moe_compress.compress.topk.apply import TopkChange
from moe_compress.compress.topk.config import TopkConfig
from moe_compress.compress.topk.plan import PERPLEXITY, TopkPlan, plan_topk
from moe_compress.compress.topk.profile import profile, variants
from moe_compress.models.layers import MoELayer, divides_gates, find_moe_layers, has_fixed_top_k
from moe_compress.models.skeleton import build_skeleton
from moe_compress.runtime.families import causal_model, parsed_config


class TopkStep(Step[TopkConfig]):
    """Lets tokens use fewer experts."""

    @property
    def is_calibrated(self) -> bool:
        return self.config.allocation == "per_layer"

    @property
    def uses_scores(self) -> bool:
        return self.is_calibrated

    def preview(self, before: Outlook, tier: str) -> tuple[dict[str, Any], Outlook]:
        content = before.config.to_dict()
        layers = find_moe_layers(build_skeleton(before.config))
        entry: dict[str, Any] = self.config.model_dump(mode="json", exclude_unset=True)
        measured = not self.is_calibrated or before.scores is not None
        step = self if measured else TopkStep(self.config.model_copy(update={"allocation": "uniform"}))
        plan = step.plan(before.scores, layers, before.config)
        change = TopkChange(plan, divides=divides_gates(before.config))
        if not change.is_stock:
            causal_model(content)
        summary = (
            plan.to_json()["summary"] if measured else ["What fewer experts cost in each layer is measured first."]
        )
        return entry | {"summary": summary}, before.resized(parsed_config(change.config(content)))

    def score(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Scores:
        scores = scoring.score(source, folder, around, title, settings=self.score_settings())
        if not self.is_calibrated or all(PERPLEXITY in layer.tables for layer in scores.layers):
            return scores
        tokens = scoring.calibration_data(source, around).tokens[: self.config.samples]
        file = folder / "profile.json"
        with around.progress.stage(
            f"{title}: profile", len(variants([s.top_k for s in scores.layers])), "pass"
        ) as stage:
            found = profile(
                source,
                tokens,
                self.config,
                batch_size=around.calibration.batch_size,
                device=around.device,
                file=file,
                stage=stage,
            )
        layers = [
            replace(layer, tables=layer.tables | {PERPLEXITY: np.asarray(found[layer.layer])})
            for layer in scores.layers
        ]
        scores = replace(scores, layers=layers)
        scores.save(folder)
        file.unlink()
        return scores

    def score_settings(self) -> dict[str, Any]:
        if not self.is_calibrated:
            return {}
        return {"topk": {"samples": self.config.samples, "normalise_over": self.config.normalise_over}}

    def plan(self, scores: Scores | None, layers: Sequence[MoELayer], model_config: Any) -> TopkPlan:
        """Choose the experts per token of every layer."""
        return plan_topk(
            self.config,
            [(moe.layer, moe.num_experts, moe.top_k) for moe in layers],
            scores,
            divides=divides_gates(model_config),
            fixed=has_fixed_top_k(model_config),
        )

    def run(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Record:
        stream = LayerStream(source, around.device)
        folder.mkdir(parents=True, exist_ok=True)
        scores = self.score(source, folder / "scores", around, title) if self.is_calibrated else None
        plan = self.plan(scores, [*stream.moe_layers.values()], source.config)
        write_json(folder / "plan.json", plan.to_json())
        checkpoint = folder / "checkpoint"
        if not (checkpoint / LEDGER_FILE).exists():
            change = TopkChange(plan, divides=divides_gates(source.config))
            with around.progress.stage(f"{title}: apply", len(stream.layers)) as stage:
                rewrite(
                    source,
                    checkpoint,
                    change,
                    max_shard_bytes=around.max_shard_bytes,
                    device=around.device,
                    stage=stage,
                )
        return Record(
            op="topk",
            config=self.config.model_dump(mode="json"),
            label=f"top-{plan.achieved:.4g}",
            dropped_bytes=0,
            targets=[Target("experts per token", plan.asked, plan.achieved, 0.5 + 1e-9, shown=".4g")],
            calibration=scores.fingerprint if scores else {},
        )
