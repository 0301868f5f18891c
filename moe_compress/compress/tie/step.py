"""`op: tie` as a step: sample every expert's tokens and measure the costs of matching, plan, fit the banks, apply."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.record import SIZE, Record, Target
from moe_compress.checkpoint.rewrite import LEDGER_FILE, Change, open_rewritten, rewrite
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress import scoring
from moe_compress.compress.operation import Outlook, Step
from moe_compress.compress.quantize.sizes import Sizes
from moe_compress.compress.surroundings import Surroundings
from moe_compress.compress.tie.apply import ExpandChange, TieChange, banks_of
from moe_compress.compress.tie.bank import make_banks
from moe_compress.compress.tie.config import TieConfig
from moe_compress.compress.tie.costs import by_output, by_weights
from moe_compress.compress.tie.losses import group_losses
from moe_compress.compress.tie.plan import (
    TiedGroup,
    TiedLayer,
    TiePlan,
    cost_name,
    group_layers,
    loss_name,
    matched_groups,
    plan_tie,
    ranks_of,
    stored_bytes,
)
from moe_compress.compress.tie.samples import ExpertSamples, load_samples, sample_file
from moe_compress.models.layers import require_no_banks
from moe_compress.runtime.families import banked, causal_model
from moe_compress.verification.checks import require_coverage

GONE = "The tier `stock` cannot share experts: every layer has its own copy, and the memory that tying saves is gone."


class TieStep(Step[TieConfig]):
    """Shares experts between layers."""

    @property
    def is_calibrated(self) -> bool:
        return True

    def preview(self, before: Outlook, tier: str) -> tuple[dict[str, Any], Outlook]:
        require_no_banks(before.config, "tie")
        causal_model(before.config.to_dict())
        sizes = Sizes.of_config(before.config, before.stored_bytes)
        if before.scores is None and self.config.choose == "auto":
            summary = ["Groups and ranks are chosen when their losses are measured."]
            stored = before.stored_bytes if tier == "stock" else self.config.stored_bytes or before.stored_bytes
            return {"op": "tie", "summary": summary}, before.of_size(stored_bytes=stored)
        plan = self._outline(sizes) if before.scores is None else self.plan(before.scores, sizes)
        found = plan.to_json()
        entry: dict[str, Any] = {"op": "tie", "group_size": self.config.group_size, "summary": found["summary"]}
        largest = max(len(group.layers) for group in plan.groups)
        if largest < self.config.group_size:
            entry["warnings"] = [f"group_size: the largest group of layers that can share a bank is {largest}."]
        if before.scores is not None:
            entry["groups"] = found["groups"]
        if tier == "stock":
            return entry | {"summary": [*found["summary"], GONE]}, before.of_size(stored_bytes=before.stored_bytes)
        num_experts = plan.groups[0].num_experts
        return entry, before.resized(banked(before.config, num_experts, banks_of(plan)))

    def score(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Scores:
        measurement = partial(ExpertSamples, folder=folder / "samples", limit=self.config.fit_tokens)
        scores = scoring.score(source, folder, around, title, measurement=measurement, settings=self.score_settings())
        stream = LayerStream(source, around.device)
        groups = group_layers(self.config, Sizes.of_stream(stream).shapes)
        pairs = [(group[0], follower) for group in groups for follower in group[1:]]
        found = {layer.layer: layer.statistics for layer in scores.layers}
        missing = [pair for pair in pairs if cost_name(pair[0]) not in found[pair[1]]]
        if self.config.match is not False and missing:
            with around.progress.stage(f"{title}: match", len(missing), "pair of layers") as stage:
                for leader, follower in missing:
                    found[follower][cost_name(leader)] = self._costs(stream, leader, follower, folder / "samples")
                    stage.advance(f"{leader} and {follower}")
            scores.save(folder)
        if self.config.choose == "auto":
            self._add_losses(scores, stream, folder, around, title)
        return scores

    def score_settings(self) -> dict[str, Any]:
        names = ["group_size", "prelude", "coda", "match", "fit_tokens"]
        if self.config.choose == "auto":
            names += ["align", "fit", "fit_steps", "rank_options"]
        return {"tie": {name: getattr(self.config, name) for name in names}}

    def run(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Record:
        scores = self.score(source, folder / "scores", around, title)
        stream = LayerStream(source, around.device)
        sizes = Sizes.of_stream(stream)
        plan = self.plan(scores, sizes)
        stock = around.tier == "stock"
        content = plan.to_json()
        write_json(folder / "plan.json", content | ({"summary": [*content["summary"], GONE]} if stock else {}))
        record = self._record(plan, scores, sizes, stock)
        require_coverage(record)
        samples = self._samples(source, plan, folder, around, title)
        if not (folder / "checkpoint" / LEDGER_FILE).exists():
            with around.progress.stage(f"{title}: fit", len(plan.groups), "bank") as stage:
                make_banks(plan, stream, samples, folder / "banks", stage)
            data = scoring.calibration_data(source, around)
            change = TieChange(plan, folder / "banks", data.tokens, around.calibration.batch_size)
            tied = folder / ("tied" if stock else "checkpoint")
            self._rewrite(source, tied, change, around, f"{title}: apply")
            if stock:
                expand = ExpandChange(LayerStream(open_rewritten(tied, source), around.device))
                self._rewrite(source, folder / "checkpoint", expand, around, f"{title}: expand")
                shutil.rmtree(tied)
        return record

    def plan(self, scores: Scores, sizes: Sizes) -> TiePlan:
        """Match the experts of every group and, if asked to, choose the groups."""
        return plan_tie(self.config, scores, sizes.shapes, sizes.stored_bytes)

    def _samples(self, source: Checkpoint, plan: TiePlan, folder: Path, around: Surroundings, title: str) -> Path:
        """The folder of every expert's sampled tokens; they are taken again where scores came without them."""
        own, again = folder / "scores" / "samples", folder / "sampled" / "samples"
        layers = list(plan.group_of)
        if all(sample_file(own, layer).exists() for layer in layers):
            return own
        if not all(sample_file(again, layer).exists() for layer in layers):
            measurement = partial(ExpertSamples, folder=again, limit=self.config.fit_tokens)
            scoring.score(source, folder / "sampled", around, f"{title}: sample", measurement=measurement)
        return again

    def _rewrite(self, source: Checkpoint, folder: Path, change: Change, around: Surroundings, title: str) -> None:
        if (folder / LEDGER_FILE).exists():
            return
        with around.progress.stage(title, source.config.get_text_config().num_hidden_layers) as stage:
            rewrite(source, folder, change, max_shard_bytes=around.max_shard_bytes, device=around.device, stage=stage)

    def _costs(self, stream: LayerStream, leader: int, follower: int, samples: Path) -> NDArray[np.float64]:
        """What each of the follower's experts costs in the place of each of the leader's, [E, E]."""
        for layer in (leader, follower):
            stream.load(layer)
        own, other = stream.moe_layers[follower], stream.moe_layers[leader]
        if self.config.match == "weights":
            costs = by_weights(own.experts, other.experts, own.num_experts)
        else:
            own_tokens, other_tokens = (
                load_samples(samples, moe.layer, moe.num_experts, moe.width) for moe in (own, other)
            )
            costs = by_output(own.experts, other.experts, own_tokens, other_tokens)
        for layer in (leader, follower):
            stream.release(layer)
        return costs

    def _add_losses(self, scores: Scores, stream: LayerStream, folder: Path, around: Surroundings, title: str) -> None:
        """Enter into each leader's statistics what its group would lose for every rank, and save them."""
        measured = {layer.layer: layer for layer in scores.layers}
        groups = matched_groups(self.config, scores, Sizes.of_stream(stream).shapes)
        missing = [g for g in groups if loss_name(self.config.rank_options[0]) not in measured[g.leader].statistics]
        if not missing:
            return
        with around.progress.stage(f"{title}: losses", len(missing), "group") as stage:
            for group in missing:
                for tied in group.layers:
                    stream.load(tied.layer)
                found = group_losses(self.config, group, stream, folder / "samples", measured)
                measured[group.leader].statistics.update(found)
                for tied in group.layers:
                    stream.release(tied.layer)
                stage.advance(f"of layer {group.leader}")
        scores.save(folder)

    def _outline(self, sizes: Sizes) -> TiePlan:
        """The plan as far as it is known without scores."""
        groups = []
        for layers in group_layers(self.config, sizes.shapes):
            count = next(shape.num_experts for shape in sizes.shapes if shape.layer == layers[0])
            tied = tuple(TiedLayer(layer, tuple(range(count)), (1 / len(layers),) * count) for layer in layers)
            groups.append(TiedGroup(count, tied, ranks_of(sizes.shapes[0], self.config.residual_rank)))
        return TiePlan(self.config, tuple(groups), len(sizes.shapes))

    def _record(self, plan: TiePlan, scores: Scores, sizes: Sizes, stock: bool) -> Record:
        tied, dropped = plan.group_of, sizes.expert_bytes - stored_bytes(plan, sizes.shapes)
        if self.config.stored_bytes is not None:
            reached = sizes.stored_bytes - dropped
            targets = [Target("stored_bytes", self.config.stored_bytes, reached, 0, at_most=True, shown=SIZE)]
        else:
            asked = sum(map(len, group_layers(self.config, sizes.shapes)))
            targets = [Target("tied layers", asked, len(tied), 0, shown="g")]
        return Record(
            op="tie",
            config=self.config.model_dump(mode="json"),
            label=label(self.config),
            dropped_bytes=0 if stock else dropped,
            targets=targets,
            coverage=scores.summary(),
            calibration=scores.fingerprint,
            pooled=[pair for pair in scores.starved if pair[0] in tied],
        )


def label(config: TieConfig) -> str:
    """What is shared and how it is fitted, in a few words."""
    residual = f", rank {config.residual_rank}" if config.residual_rank else ""
    residual = f", {config.stored_bytes:,} bytes" if config.choose == "auto" else residual
    return f"groups of {config.group_size}, {config.fit}{residual}"
