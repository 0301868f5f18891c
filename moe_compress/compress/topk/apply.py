"""Fewer experts per token in a checkpoint: only its configuration changes.

Where every layer picks and runs the same number, the family's own setting says so and plain transformers loads the
result; else it is one of the tier `plugin`.
"""

from __future__ import annotations

from typing import Any

from moe_compress.checkpoint.config_file import with_setting
from moe_compress.compress.metered import MeteredChange
from moe_compress.compress.topk.plan import TopkPlan
from moe_compress.models.families import TOP_K_KEYS
from moe_compress.models.layers import SECTION
from moe_compress.runtime.families import with_layers


class TopkChange(MeteredChange):
    """Applies a plan. `divides` says whether the family's router divides the gate values by their sum."""

    def __init__(self, plan: TopkPlan, *, divides: bool) -> None:
        self.plan, self.divides = plan, divides

    @property
    def is_stock(self) -> bool:
        """Whether the family's own setting holds the result."""
        return len({layer.k for layer in self.plan.layers}) == 1 and (
            not self.divides or all(layer.picked == layer.k for layer in self.plan.layers)
        )

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        first = self.plan.layers[0]
        if self.is_stock and SECTION not in config:
            for before in {layer.picked_before for layer in self.plan.layers}:
                config = with_setting(config, TOP_K_KEYS, before, first.k)
            return config
        entries = {layer.layer: {"top_k": layer.k, "normalise_over": layer.picked} for layer in self.plan.layers}
        return with_layers(config, first.num_experts, entries)
