"""Whether a budget can be met, and what it leads to, before any cost is measured: sizes in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_compress.compress.quantize.config import BUDGETS, QuantizeConfig
from moe_compress.compress.quantize.plan import DROP, KEEP, SHAPE_BYTES, ExpertShapes, matrix_bytes, option_bits
from moe_compress.errors import NoAllocationError
from moe_compress.settings import shown_budget


@dataclass(frozen=True)
class Reach:
    """The least and the most that a step's options allow of each budget, and the experts' bytes that are expected."""

    ranges: dict[str, tuple[float, float]]
    expert_bytes: int

    def sentence(self, config: QuantizeConfig) -> str:
        """What was asked and what is possible, for the reader."""
        asked = [
            f"{name} {shown_budget(name, value)} is within reach ({self._range(name)})"
            for name, value in config.budgets.items()
        ]
        return "; ".join(asked) or f"a budget can be {' or '.join(f'{name} {self._range(name)}' for name in BUDGETS)}"

    def _range(self, name: str) -> str:
        low, high = self.ranges[name]
        return f"{shown_budget(name, low, up=True)} to {shown_budget(name, high)}"


def reach(config: QuantizeConfig, shapes: Sequence[ExpertShapes], fixed_bytes: int, tier: str) -> Reach:
    """What the options of a budget can lead to; `fixed_bytes` is what the checkpoint holds besides routed experts.

    The expected bytes are those of the asked average, between the two options around it, or what the budget leaves for
    the experts, or the most where no budget is given yet. Raises `NoAllocationError` when no choice of options is as
    small as the budget asks.
    """
    names = [str(bits) for bits in config.options] + [KEEP] * config.keep_option
    dense = {name: _expert_bytes(config, shapes, name, tier) for name in names}
    widest = max(names, key=option_bits)
    narrowest = min(names, key=option_bits)
    least, most = dense[narrowest], dense[widest]
    least_bits = option_bits(narrowest)
    if config.allow_drop:
        share = sum(shape.top_k * shape.weights for shape in shapes) / sum(
            shape.num_experts * shape.weights for shape in shapes
        )
        least, least_bits = round(least * share), least_bits * share
    used = sum(shape.top_k for shape in shapes) / sum(shape.num_experts for shape in shapes)
    ranges = {
        "average_bits": (least_bits, option_bits(widest)),
        "stored_bytes": (fixed_bytes + least, fixed_bytes + most),
        # dropping does not change how many experts a token uses
        "active_bytes": (dense[narrowest] * used, most * used),
    }
    for name, (low, _) in ranges.items():
        asked = getattr(config, name)
        if asked is not None and asked < low:
            raise NoAllocationError(
                f"{name}: {shown_budget(name, asked)} cannot be reached, {shown_budget(name, low, up=True)} is the "
                "least that these options leave; raise it, or allow fewer bits."
            )
    return Reach(ranges, min([most, *_asked(config, dense, fixed_bytes, used)]))


def _asked(config: QuantizeConfig, dense: dict[str, int], fixed_bytes: int, used: float) -> list[int]:
    """The experts' bytes that each budget leads to."""
    found = []
    if config.average_bits is not None:
        points = {option_bits(name): stored for name, stored in dense.items()} | ({0.0: 0} if config.allow_drop else {})
        bits = sorted(points)
        found.append(round(np.interp(config.average_bits, bits, [points[width] for width in bits])))
    if config.stored_bytes is not None:
        found.append(config.stored_bytes - fixed_bytes)
    if config.active_bytes is not None:
        found.append(round(config.active_bytes / used))
    return found


def _expert_bytes(config: QuantizeConfig, shapes: Sequence[ExpertShapes], option: str, tier: str) -> int:
    """Of all routed experts when every one has the same option."""
    assert option != DROP
    noted = SHAPE_BYTES if tier == "stock" else 0
    return sum(
        shape.num_experts
        * (
            shape.other_bytes
            + sum(
                matrix_bytes(option, rows, columns, config, shape.weight_bytes) + noted
                for rows, columns in shape.projections.values()
            )
        )
        for shape in shapes
    )
