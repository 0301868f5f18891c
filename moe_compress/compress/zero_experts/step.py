"""`op: zero_experts` as a step: plan, apply, count how many experts a token then uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_compress.checkpoint.index import DTYPE_BITS
from moe_compress.checkpoint.record import Record
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.stream import TORCH_DTYPES, LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress import scoring
from moe_compress.compress.metered import traffic_map, write_metered
from moe_compress.compress.operation import Outlook, Step
from moe_compress.compress.surroundings import Surroundings
from moe_compress.compress.zero_experts.apply import ZeroExpertsChange
from moe_compress.compress.zero_experts.config import ZeroExpertsConfig
from moe_compress.compress.zero_experts.plan import LayerFacts, ZeroExpertsPlan, plan_zero_experts
from moe_compress.models.layers import MoELayer, find_moe_layers
from moe_compress.models.skeleton import build_skeleton
from moe_compress.runtime.families import causal_model, parsed_config


class ZeroExpertsStep(Step[ZeroExpertsConfig]):
    """Adds zero experts."""

    @property
    def is_calibrated(self) -> bool:
        return True

    @property
    def uses_scores(self) -> bool:
        return False

    def preview(self, before: Outlook, tier: str) -> tuple[dict[str, Any], Outlook]:
        content = before.config.to_dict()
        causal_model(content)
        plan = self.plan(find_moe_layers(build_skeleton(before.config)))
        found = plan.to_json()
        after = before.resized(parsed_config(ZeroExpertsChange(plan, {}).config(content)))
        return self.config.model_dump(mode="json", exclude_unset=True) | {"summary": found["summary"]}, after

    def plan(self, layers: Sequence[MoELayer]) -> ZeroExpertsPlan:
        """Count the zero experts of every layer."""
        facts = [LayerFacts(moe.layer, moe.num_experts, moe.top_k, moe.routing.zero_experts) for moe in layers]
        return plan_zero_experts(self.config, facts, layers[0].num_groups)

    def run(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Record:
        stream = LayerStream(source, around.device)
        plan = self.plan([*stream.moe_layers.values()])
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "plan.json", plan.to_json())
        data = scoring.calibration_data(source, around)
        change = ZeroExpertsChange(plan, {name: TORCH_DTYPES[dtype] for name, dtype in stream.stored_dtypes.items()})
        counted = write_metered(source, folder, change, data.tokens, around, title)
        write_json(folder / "plan.json", plan.to_json() | {"maps": [traffic_map(counted)]})
        return Record(
            op="zero_experts",
            config=self.config.model_dump(mode="json"),
            label=f"{plan.layers[0].zero_experts} zero experts, {self.config.init}",
            dropped_bytes=-added_bytes(plan, stream),
            calibration=scoring.describe_data(source, data),
        )


def added_bytes(plan: ZeroExpertsPlan, stream: LayerStream) -> int:
    """Stored bytes of the routers' new rows, worked out from the source's headers."""
    total = 0
    for layer in plan.layers:
        moe = stream.moe_layers[layer.layer]
        for name, (tensor, dimension) in moe.router_tensors().items():
            bits = DTYPE_BITS[stream.stored_dtypes[f"{moe.block_name}.{name}"]]
            total += tensor.numel() // tensor.shape[dimension] * bits // 8 * layer.zero_experts
    return total
