"""`op: quantize` as a step: measure what each option costs where a budget asks for it, plan, apply."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.gradients import channel_gradients
from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.index import TensorIndex
from moe_compress.checkpoint.record import SIZE, Record, Target
from moe_compress.checkpoint.rewrite import LEDGER_FILE, rewrite
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress import scoring
from moe_compress.compress.demand import Demand
from moe_compress.compress.operation import Outlook, Step
from moe_compress.compress.prune.apply import with_counts
from moe_compress.compress.quantize.apply import QuantizeChange
from moe_compress.compress.quantize.config import BITSANDBYTES, QuantizeConfig
from moe_compress.compress.quantize.demand import quantize_demands
from moe_compress.compress.quantize.plan import (
    QuantizePlan,
    effective,
    measured_settings,
    plan_quantize,
)
from moe_compress.compress.quantize.reach import reach
from moe_compress.compress.quantize.sensitivity import ReducedRouters, Sensitivity, require_droppable
from moe_compress.compress.quantize.shared import collect_moments, has_moments, joined
from moe_compress.compress.quantize.sizes import Sizes, active_bytes, check_group_sizes, with_group_size
from moe_compress.compress.quantize.storage import require_quantizable, scale_dtype_of
from moe_compress.compress.surroundings import Surroundings
from moe_compress.errors import NoAllocationError
from moe_compress.models.layers import MoELayer, owners, routing_groups
from moe_compress.runtime.families import causal_model
from moe_compress.settings import shown_budget

BUDGET_TOLERANCE = 0.02  # of the budget
FRONTIER = ("bits", "stored", "dropped_experts", "predicted_loss", "relaxation_bound", "optimal", "infeasible")


class QuantizeStep(Step[QuantizeConfig]):
    """Packs weights; `plan` is public so that budgets can be swept."""

    @property
    def is_calibrated(self) -> bool:
        return self.config.has_budget or self.config.method == "gptq"

    @property
    def uses_scores(self) -> bool:
        return self.config.has_budget

    def at_random(self, seed: int) -> QuantizeStep | None:
        drawn = {"allocation": "random", "seed": seed}
        return QuantizeStep(self.config.model_copy(update=drawn)) if self.config.has_budget else None

    def preview(self, before: Outlook, tier: str) -> tuple[dict[str, Any], Outlook]:
        if tier == "plugin":
            causal_model(before.config.to_dict())
        if self.config.allow_drop:
            require_droppable(before.config)
        sizes = Sizes.of_config(before.config, before.stored_bytes)
        entry: dict[str, Any] = self.config.model_dump(mode="json", exclude_unset=True)
        config = with_group_size(self.config, sizes)
        check_group_sizes(config, sizes)
        if before.original is not None and (tier == "stock" or config.embeddings is not None):
            require_quantizable(config, LayerStream(before.original), tier)
        entry |= {"warnings": list(self._warnings(config, sizes, tier))}
        if config.has_budget and (before.scores is None or not config.budgets):
            expected = reach(config, sizes.shapes, sizes.fixed_bytes(config, tier), tier)
            chosen = "the bits of every expert are chosen when its costs are measured"
            entry |= {"reachable": expected.ranges, "summary": [f"{expected.sentence(config)}; {chosen}."]}
            stored = sizes.fixed_bytes(config, tier) + expected.expert_bytes
            return entry, self._smaller(before, sizes, tier, stored, expected.expert_bytes)
        plan = self.plan(before.scores, sizes, before.config, tier)
        shares, changed = sizes.shares, before
        if plan.num_dropped:
            counts = {layer.layer: len(layer.keep) for layer in plan.layers}
            content = with_counts(before.config.to_dict(), plan.layers[0].num_experts, counts)
            changed = before.resized(CONFIG_MAPPING[content["model_type"]].from_dict(content))
            shares = Sizes.of_config(changed.config, changed.stored_bytes).shares
        outside = sizes.saved_outside(config, tier) - sizes.saved_unread(config)  # which every token reads
        active = changed.active_bytes - outside - active_bytes(sizes.saved_in_experts(plan, tier), shares)
        saved = sizes.saved_by_part(config, tier)
        after = changed.of_size(stored_bytes=sizes.bytes_after(plan, tier), active_bytes=round(active), saved=saved)
        found = plan.to_json()
        shown = {key: found[key] for key in ("summary", "layers", "allocation")}
        return entry | shown | {"average_bits_chosen": plan.average_bits}, after

    def _warnings(self, config: QuantizeConfig, sizes: Sizes, tier: str) -> Iterator[str]:
        """What of the settings changes nothing here."""
        found = {linear.part for linear in sizes.linears}
        for part in config.parts:
            if part not in found:
                yield f"{part}: this model has no such linear layers, so it changes nothing; leave it out."
        if config.allocation != "optimal":
            for name in {"cost", "measured_by"} & config.model_fields_set:
                what = (
                    f"allocation `{config.allocation}` looks at no loss, so it changes only the loss that is reported"
                )
                yield f"{name}: {what}; leave it out."
        if config.budgets:
            ranges = reach(config, sizes.shapes, sizes.fixed_bytes(config, tier), tier).ranges
            for name, value in config.budgets.items():
                if value > (most := ranges[name][1]):
                    yield (
                        f"{name}: {shown_budget(name, value)} is more than the options can take, "
                        f"{shown_budget(name, most, up=True)} (super experts aside), so every expert gets the most."
                    )

    def _smaller(self, before: Outlook, sizes: Sizes, tier: str, stored_bytes: int, expert_bytes: int) -> Outlook:
        """The checkpoint in `stored_bytes`, of which the routed experts take `expert_bytes`."""
        config = with_group_size(self.config, sizes)
        outside = sizes.saved_outside(config, tier) - sizes.saved_unread(config)  # which every token reads
        share = sum(sizes.shares.values()) / len(sizes.shares)
        active = before.active_bytes - outside - share * (sizes.expert_bytes - expert_bytes)
        saved = sizes.saved_by_part(config, tier)
        return before.of_size(stored_bytes=stored_bytes, active_bytes=round(active), saved=saved)

    def demands(self, before: Outlook, after: Outlook, calibration: CalibrationConfig) -> list[Demand]:
        sizes = Sizes.of_config(before.config, before.stored_bytes)
        config = with_group_size(self.config, sizes)
        return quantize_demands(config, sizes, before.size, after.stored_bytes, calibration)

    def point(self, before: Outlook, tier: str) -> dict[str, Any]:
        """The best allocation for the budget, as a line of a frontier; `infeasible` says why there is none."""
        sizes = Sizes.of_config(before.config, before.stored_bytes)
        try:
            plan = self.plan(before.scores, sizes, before.config, tier)
        except NoAllocationError as error:
            return dict.fromkeys(FRONTIER) | {"infeasible": str(error)}
        assert plan.allocation is not None
        found = (plan.average_bits, sizes.bytes_after(plan, tier), plan.num_dropped)
        proof = (plan.allocation[name] for name in ("loss", "relaxation_bound", "optimal"))
        return dict(zip(FRONTIER, (*found, *proof, None), strict=True))

    def score(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Scores:
        if not self.config.has_budget or (folder / "scores.json").exists():
            return scoring.score(source, folder, around, title)
        stream = LayerStream(source, around.device)
        config = with_group_size(self.config, Sizes.of_stream(stream))
        weights = self._channel_weights(source, folder, around, title) if config.cost == "fisher" else {}
        return scoring.score(
            source,
            folder,
            around,
            title,
            measurement=sensitivities(config, source, stream, weights),
            settings={"quantize": measured_settings(config)},
        )

    def score_settings(self) -> dict[str, Any]:
        if not self.config.has_budget:
            return {}
        asked = {name: getattr(self.config, name) for name in ("options", "granularity", "allow_drop", "cost")}
        return {"quantize": measured_settings(self.config) | asked}

    def plan(self, scores: Scores | None, sizes: Sizes, model_config: Any, tier: str) -> QuantizePlan:
        """Choose every expert's bits by the scores and the budget."""
        config = with_group_size(self.config, sizes)
        return plan_quantize(
            config,
            sizes.shapes,
            joined(scores, owners(model_config)) if scores is not None else None,
            fixed_bytes=sizes.fixed_bytes(config, tier),
            num_decoder_layers=model_config.get_text_config().num_hidden_layers,
            num_groups=routing_groups(model_config),
            tier=tier,
        )

    def run(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Record:
        stream = LayerStream(source, around.device)
        sizes = Sizes.of_stream(stream)
        config = with_group_size(self.config, sizes)
        check_group_sizes(config, sizes)
        require_quantizable(config, stream, around.tier)
        folder.mkdir(parents=True, exist_ok=True)
        scores = self.score(source, folder / "scores", around, title) if self.config.has_budget else None
        if (folder / "plan.json").exists():  # a solver that ran out of time need not choose the same again
            plan = QuantizePlan.from_json(json.loads((folder / "plan.json").read_text(encoding="utf-8")))
        else:
            plan = self.plan(scores, sizes, source.config, around.tier)
            write_json(folder / "plan.json", plan.to_json())
        data = scoring.calibration_data(source, around) if self.is_calibrated else None
        change = QuantizeChange(
            plan,
            sizes.linears,
            tier=around.tier,
            scale_dtype=sizes.scale_dtype,
            tokens=data.tokens if data is not None and self.config.method == "gptq" else None,
            batch_size=around.calibration.batch_size,
            notes=folder / "pooled.json",
            moments=self._shared_moments(stream, folder / "moments", around, title),
        )
        if not (folder / "checkpoint" / LEDGER_FILE).exists():
            with around.progress.stage(f"{title}: apply", len(stream.layers)) as stage:
                rewrite(
                    source,
                    folder / "checkpoint",
                    change,
                    max_shard_bytes=around.max_shard_bytes,
                    device=around.device,
                    stage=stage,
                )
        stored = sizes.bytes_after(plan, around.tier)
        starved = scores.starved if scores else []
        kept = {(layer.layer, expert) for layer in plan.layers for expert in layer.keep}
        tokens = {"calibration_tokens": data.tokens.numel()} if data is not None else {}
        described = scoring.describe_data(source, data) if data is not None else {}
        return Record(
            op="quantize",
            config=effective(plan.config),
            label=label(plan.config),
            dropped_bytes=sizes.stored_bytes - stored,
            targets=targets(plan, TensorIndex.from_folder(folder / "checkpoint").nbytes),
            coverage=scores.summary() if scores else tokens,
            calibration=scores.fingerprint if scores else described,
            starved_dropped=[pair for pair in starved if pair not in kept],
            pooled=sorted({*change.pooled, *(pair for pair in starved if pair in kept)}),
        )

    def _shared_moments(self, stream: LayerStream, folder: Path, around: Surroundings, title: str) -> Path | None:
        """Where the second moments of experts that several layers use are, if gptq needs any."""
        if not stream.owners or self.config.method != "gptq":
            return None
        if not has_moments(folder, stream.owners):
            data = scoring.calibration_data(stream.checkpoint, around)
            with around.progress.stage(f"{title}: shared experts", len(stream.layers)) as stage:
                collect_moments(stream, data.tokens, around.calibration.batch_size, folder, stage)
        return folder

    def _channel_weights(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> dict[int, Tensor]:
        """The loss gradient's second moment at every layer's output, for `cost: fisher`."""
        stream, data = LayerStream(source, around.device), scoring.calibration_data(source, around)
        with around.progress.stage(f"{title}: gradients", 2 * len(stream.layers)) as stage:
            return channel_gradients(
                stream,
                data.tokens[: self.config.gradient_samples],
                batch_size=around.calibration.batch_size,
                folder=folder,
                stage=stage,
            )


def targets(plan: QuantizePlan, stored_bytes: int) -> list[Target]:
    """What a budget asked for, and what came of it; `stored_bytes` are those of the written files."""
    if plan.allocation is None:
        bits = plan.config.bits
        return [] if bits is None else [Target("average_bits", bits, plan.average_bits, 0.0)]
    achieved = {
        "average_bits": plan.average_bits,
        "stored_bytes": stored_bytes,
        "active_bytes": plan.allocation["active_bytes"],
    }
    return [
        Target(
            name,
            value,
            achieved[name],
            BUDGET_TOLERANCE * value,
            at_most=True,
            shown=",.6g" if name == "average_bits" else SIZE,
            on_disk=name == "stored_bytes",
        )
        for name, value in plan.config.budgets.items()
    ]


def sensitivities(
    config: QuantizeConfig, source: Checkpoint, stream: LayerStream, channel_weights: dict[int, Tensor]
) -> Callable[[MoELayer], Sensitivity]:
    """Makes what measures the costs of a layer's options; `channel_weights` are those of `cost: fisher`."""
    routers = ReducedRouters(source.config) if config.allow_drop else None
    scale_dtype = scale_dtype_of(stream)
    return lambda moe: Sensitivity(
        config, moe, scale_dtype, routers=routers, channel_weights=channel_weights.get(moe.layer)
    )


def label(config: QuantizeConfig) -> str:
    """The method and the bits, in a few words."""
    if config.method in BITSANDBYTES:
        return config.method
    budgets = [f"{name} {shown_budget(name, value)}" for name, value in config.budgets.items()]
    return f"{config.method}, {', '.join(budgets) or f'{config.bits} bits'}"
