"""Adding zero experts to a checkpoint: the routers grow, nothing else changes, original rows stay bit for bit.

The result is one of the tier `plugin`. Everything that the router keeps per expert grows with it: biases and correction
biases by the same rule, entry by entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_compress.compress.metered import MeteredChange
from moe_compress.compress.zero_experts.config import ZeroExpertsConfig
from moe_compress.compress.zero_experts.plan import ZeroExpertsPlan
from moe_compress.models.layers import SECTION, MoELayer
from moe_compress.models.routing import USE_ZERO_EXPERTS, router_rows
from moe_compress.runtime.families import with_layers


class ZeroExpertsChange(MeteredChange):
    """Applies a plan. `dtypes` are the types that the routers' tensors are stored in, by name in the model."""

    def __init__(self, plan: ZeroExpertsPlan, dtypes: Mapping[str, torch.dtype]) -> None:
        self.plan, self.dtypes = plan, dtypes
        self.counts = {layer.layer: layer.zero_experts for layer in plan.layers}

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        entries = {layer: {"zero_experts": count} for layer, count in self.counts.items()}
        new = with_layers(config, self.plan.layers[0].num_experts, entries)
        return new | {SECTION: {USE_ZERO_EXPERTS: True, **new[SECTION]}}

    def layer(self, moe: MoELayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's tensors with the zero experts' rows in its router."""
        rng = np.random.default_rng([self.plan.config.seed, moe.layer])
        changed = dict(state)
        for name, (_, dimension) in moe.router_tensors().items():
            inside = f"{moe.block_path}.{name}".lstrip(".")
            dtype = self.dtypes[f"{moe.block_name}.{name}"]
            changed[inside] = with_zero_rows(
                state[inside], dimension, moe, self.counts[moe.layer], self.plan.config, rng, dtype
            )
        return changed


def with_zero_rows(
    tensor: Tensor,
    dimension: int,
    moe: MoELayer,
    count: int,
    config: ZeroExpertsConfig,
    rng: np.random.Generator,
    dtype: torch.dtype,
) -> Tensor:
    """A router tensor with `count` entries more in `dimension`, where `router_rows` has them.

    Their values are exact in `dtype`, as those of the tensor are. The deviation is that of a sample (n - 1).
    """
    rows = tensor.movedim(dimension, 0)
    routed, beyond = rows[: moe.num_experts], rows[moe.num_experts :]
    if config.init == "tile":
        new = routed[torch.arange(count, device=routed.device) % moe.num_experts]
    else:
        original = routed.double().cpu().numpy()
        drawn = original.mean(0) + original.std(0, ddof=1) * rng.standard_normal((count, *original.shape[1:]))
        new = torch.from_numpy(drawn).to(dtype).to(routed)
    experts, zeros = router_rows(moe.num_experts, count, moe.num_groups)
    wider = routed.new_empty(moe.num_experts + count, *routed.shape[1:])
    wider[experts], wider[zeros] = routed, new
    return torch.cat([wider, beyond]).movedim(0, dimension).contiguous()
