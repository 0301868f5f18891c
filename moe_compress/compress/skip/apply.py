"""Dynamic skipping in a checkpoint: only its configuration changes, and it becomes one of the tier `plugin`."""

from __future__ import annotations

from typing import Any

from moe_compress.compress.metered import MeteredChange
from moe_compress.compress.skip.plan import SkipPlan
from moe_compress.runtime.families import with_layers


class SkipChange(MeteredChange):
    """Applies a plan."""

    def __init__(self, plan: SkipPlan) -> None:
        self.plan = plan

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        settings = {"renormalise": self.plan.config.renormalise, "protect": self.plan.config.protect}
        entries = {layer.layer: {"skip": {"threshold": layer.threshold, **settings}} for layer in self.plan.layers}
        return with_layers(config, self.plan.layers[0].num_experts, entries)
