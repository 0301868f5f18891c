"""`op: skip` as a step: gate ratios, thresholds, and how many experts a token then uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.record import Record, Target
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress import scoring
from moe_compress.compress.metered import skip_ratio_map, write_metered
from moe_compress.compress.operation import Outlook, Step
from moe_compress.compress.skip.apply import SkipChange
from moe_compress.compress.skip.config import SkipConfig
from moe_compress.compress.skip.plan import SkipPlan, plan_skip
from moe_compress.compress.surroundings import Surroundings
from moe_compress.models.layers import MoELayer, find_moe_layers
from moe_compress.models.skeleton import build_skeleton
from moe_compress.runtime.families import causal_model, parsed_config, with_layers

TARGET_TOLERANCE = 0.05  # of the share of slots that are skipped


class SkipStep(Step[SkipConfig]):
    """Lets tokens skip experts by the ratio of gate values."""

    @property
    def is_calibrated(self) -> bool:
        return True

    @property
    def uses_scores(self) -> bool:
        return not isinstance(self.config.threshold, float)

    def preview(self, before: Outlook, tier: str) -> tuple[dict[str, Any], Outlook]:
        content = before.config.to_dict()
        causal_model(content)
        layers = find_moe_layers(build_skeleton(before.config))
        entry: dict[str, Any] = self.config.model_dump(mode="json", exclude_unset=True)
        if before.scores is None and self.uses_scores:
            summary = ["Each layer's threshold is chosen when its gate ratios are measured."]
            skipped = self.config.target_skip or 0.0
        else:
            plan = self.plan(before.scores if self.uses_scores else None, layers)
            summary, skipped = plan.to_json()["summary"], plan.predicted_skip or 0.0
        entries = {moe.layer: {"experts_per_token": moe.top_k * (1 - skipped)} for moe in layers}
        after = parsed_config(with_layers(content, layers[0].num_experts, entries))
        return entry | {"summary": summary}, before.resized(after)

    def plan(self, scores: Scores | None, layers: Sequence[MoELayer]) -> SkipPlan:
        """Choose the thresholds."""
        return plan_skip(self.config, scores, [(moe.layer, moe.num_experts, moe.top_k) for moe in layers])

    def run(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Record:
        stream = LayerStream(source, around.device)
        folder.mkdir(parents=True, exist_ok=True)
        scores = self.score(source, folder / "scores", around, title) if self.uses_scores else None
        plan = self.plan(scores, [*stream.moe_layers.values()])
        write_json(folder / "plan.json", plan.to_json())
        data = scoring.calibration_data(source, around)
        counted = write_metered(source, folder, SkipChange(plan), data.tokens, around, title)
        write_json(folder / "plan.json", plan.to_json() | {"maps": [skip_ratio_map(counted)]})
        used = sum(counts.experts_per_token for counts in counted.values())
        skipped = 1 - used / sum(layer.top_k for layer in plan.layers)
        asked = self.config.target_skip
        targets = [] if asked is None else [Target("slots skipped", asked, skipped, TARGET_TOLERANCE, shown=".1%")]
        return Record(
            op="skip",
            config=self.config.model_dump(mode="json"),
            label=f"threshold {self.config.threshold}" if asked is None else f"skip {asked:.0%}",
            dropped_bytes=0,
            targets=targets,
            calibration=scores.fingerprint if scores else scoring.describe_data(source, data),
        )
