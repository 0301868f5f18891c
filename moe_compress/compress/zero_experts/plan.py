"""How many zero experts each layer gets, and what that asks of a balance loss: numbers in, numbers out, no torch.

Formulas follow ZEDA (arXiv 2605.18643): with N routed experts, Z zero experts and the weight w, the group balance loss
is at its lowest where the share r = w Z / (N + w Z) of all slots is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_compress.compress.zero_experts.config import ZeroExpertsConfig
from moe_compress.errors import UsageError

FORMAT = 1


@dataclass(frozen=True)
class LayerFacts:
    """One MoE layer as it is: its index, its routed experts, the experts that its router picks, its zero experts."""

    layer: int
    num_experts: int
    top_k: int
    zero_experts: int = 0


@dataclass(frozen=True)
class ZeroExpertsPlan:
    """What the step does to every MoE layer: the layers as they will be."""

    config: ZeroExpertsConfig
    layers: tuple[LayerFacts, ...]

    @property
    def untrained_skip(self) -> float:
        """Share of slots that are skipped if all rows of the routers are chosen alike, as before any training."""
        slots = sum(layer.top_k for layer in self.layers)
        skipped = (layer.top_k * layer.zero_experts / (layer.num_experts + layer.zero_experts) for layer in self.layers)
        return sum(skipped) / slots

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able values; `summary` is for the reader."""
        counts = sorted({layer.zero_experts for layer in self.layers})
        span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return {
            "format": FORMAT,
            "op": "zero_experts",
            "summary": [
                f"each of {len(self.layers)} layers gets {span} zero experts.",
                f"If their routers chose all rows alike, {self.untrained_skip:.1%} of the slots would be skipped.",
            ],
            "config": self.config.model_dump(mode="json"),
            "untrained_skip": self.untrained_skip,
            "layers": [asdict(layer) for layer in self.layers],
        }


def plan_zero_experts(config: ZeroExpertsConfig, layers: Sequence[LayerFacts], num_groups: int = 1) -> ZeroExpertsPlan:
    """Count the zero experts of every layer; each routing group gets equally many.

    A fraction is rounded to the nearest count that the groups can share, halves up, at least one for each. Raises
    `UsageError` when a whole number cannot be shared, or a layer has zero experts already.
    """
    planned = []
    for layer in layers:
        if layer.zero_experts:
            raise UsageError(
                f"layer {layer.layer} has {layer.zero_experts} zero experts already; `zero_experts` is done once."
            )
        planned.append(
            LayerFacts(layer.layer, layer.num_experts, layer.top_k, _count(config, layer.num_experts, num_groups))
        )
    return ZeroExpertsPlan(config, tuple(planned))


def balance_weight(target_skip: float, num_experts: int, zero_experts: int) -> float:
    """The weight w of the group balance loss whose lowest point skips the share `target_skip` of all slots."""
    assert 0 < target_skip < 1, "some slots are skipped, some are not"
    return target_skip / (1 - target_skip) * num_experts / zero_experts


def _count(config: ZeroExpertsConfig, num_experts: int, num_groups: int) -> int:
    if isinstance(config.count, float):
        return max(1, math.floor(config.count * num_experts / num_groups + 0.5)) * num_groups
    if config.count % num_groups:
        below, above = config.count // num_groups * num_groups, (config.count // num_groups + 1) * num_groups
        nearest = f"{below} or {above}" if below else str(above)
        raise UsageError(
            f"count: {config.count} zero experts cannot be shared equally by {num_groups} routing groups; ask for "
            f"count: {nearest}."
        )
    return config.count
