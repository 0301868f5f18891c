"""Whether a budget can be met, and what it leads to, before any cost is measured: sizes in, numbers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_compress.compress.quantize.config import BUDGETS, QuantizeConfig
from moe_compress.compress.quantize.plan import DROP, KEEP, SHAPE_BYTES, ExpertShapes, matrix_bytes, option_bits
from moe_compress.errors import NoAllocationError, UsageError
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
    the experts, or the most where no budget is given yet. Raises `UsageError` when no choice of options is as
    small as the budget asks, or `minimum_counts` are more than the experts.
    """
    names = [str(bits) for bits in config.options] + [KEEP] * config.keep_option
    narrowest, widest = min(names, key=option_bits), max(names, key=option_bits)
    dense = {
        name: sum(_expert_bytes(config, shape, name, tier) * shape.num_experts for shape in shapes) for name in names
    }
    least = least_bits = 0.0
    for shape in shapes:
        for name, count in _fewest(config, shape, narrowest).items():
            least += count * _expert_bytes(config, shape, name, tier)
            least_bits += count * option_bits(name) * shape.weights
    used = sum(shape.top_k for shape in shapes) / sum(shape.num_experts for shape in shapes)
    ranges = {
        "average_bits": (
            least_bits / sum(shape.num_experts * shape.weights for shape in shapes),
            option_bits(widest),
        ),
        "stored_bytes": (fixed_bytes + least, fixed_bytes + dense[widest]),
        # dropping does not change how many experts a token uses
        "active_bytes": (dense[narrowest] * used, dense[widest] * used),
    }
    for name, (low, _) in ranges.items():
        asked = getattr(config, name)
        if asked is not None and asked < low:
            raise NoAllocationError(
                f"{name}: {shown_budget(name, asked)} cannot be reached, {shown_budget(name, low, up=True)} is the "
                f"least that these options {'and minimum_counts ' * bool(config.minimum_counts)}leave; raise it, or "
                "allow fewer bits."
            )
    return Reach(ranges, min([dense[widest], *_asked(config, dense, fixed_bytes, used)]))


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


def _fewest(config: QuantizeConfig, shape: ExpertShapes, narrowest: str) -> Counter[str]:
    """How many experts of a layer take each option when it is as small as it can be.

    Raises `UsageError` when `minimum_counts` asks for more experts than there are.
    """
    counts = Counter({str(bits): count for bits, count in config.minimum_counts.items()})
    if counts.total() > shape.num_experts:
        raise UsageError(
            f"minimum_counts asks for {counts.total()} experts, and layer {shape.layer} has {shape.num_experts}; ask "
            "for fewer."
        )
    stay = max(shape.top_k, counts.total()) if config.allow_drop else shape.num_experts
    counts[narrowest] += stay - counts.total()
    return counts


def _expert_bytes(config: QuantizeConfig, shape: ExpertShapes, option: str, tier: str) -> int:
    """Of a routed expert with this option."""
    assert option != DROP
    noted = SHAPE_BYTES if tier == "stock" else 0
    return shape.other_bytes + sum(
        matrix_bytes(option, rows, columns, config, shape.weight_bytes) + noted
        for rows, columns in shape.projections.values()
    )
