"""Whether budgets can be met, against plans that were made: the least, the most, and what an average leads to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.compress.quantize.config import QuantizeConfig
from moe_compress.compress.quantize.plan import ExpertShapes, measured_settings, plan_quantize
from moe_compress.compress.quantize.reach import reach
from moe_compress.compress.quantize.storage import noted_bytes
from moe_compress.errors import UsageError

FIXED = 1_000_000
SHAPES = [
    ExpertShapes(layer, 16, 4, {"gate_proj": (96, 256), "up_proj": (96, 256), "down_proj": (256, 96)}, 2, 512)
    for layer in range(4)
]


def quantize(**settings: Any) -> QuantizeConfig:
    return QuantizeConfig.model_validate({"op": "quantize", "group_size": 32} | settings)


def uniform(bits: int, tier: str, **settings: Any) -> int:
    """Stored bytes when every expert has the same bits, by the plan itself."""
    plan = plan_quantize(quantize(bits=bits, **settings), SHAPES, None, fixed_bytes=FIXED, num_decoder_layers=4)
    return FIXED + plan.expert_bytes + noted_bytes(plan, 0, tier)


@pytest.mark.parametrize("tier", ["stock", "plugin"])
def test_the_ends_are_those_of_uniform_plans(tier: str) -> None:
    found = reach(quantize(average_bits=3, options=[2, 3, 4], symmetric=False), SHAPES, FIXED, tier)
    ends = [uniform(bits, tier, symmetric=False) for bits in (2, 4)]
    assert found.ranges["stored_bytes"] == tuple(ends)
    assert found.ranges["average_bits"] == (2.0, 4.0)
    # A token uses a quarter of the experts.
    noted = 0 if tier == "plugin" else 16 * 3 * 16 * 4
    dense = (ends[0] - FIXED - noted) / 4
    assert found.ranges["active_bytes"][0] == pytest.approx(dense, rel=0.02)


def test_dropping_goes_down_to_what_a_token_uses() -> None:
    kept = reach(quantize(average_bits=3, options=[2, 4]), SHAPES, FIXED, "plugin").ranges
    dropping = reach(quantize(average_bits=3, options=[2, 4], allow_drop=True), SHAPES, FIXED, "plugin").ranges
    assert dropping["average_bits"] == (0.5, 4.0)
    least = FIXED + (kept["stored_bytes"][0] - FIXED) // 4
    assert dropping["stored_bytes"] == (least, kept["stored_bytes"][1])


@pytest.mark.parametrize("average", [1.6, 2.0, 2.5, 3.2, 4.0])
def test_an_average_leads_to_about_these_bytes(average: float) -> None:
    """Against the program's own plan on random costs, protected experts and all."""
    config = quantize(average_bits=average, options=[1, 2, 3, 4], symmetric=False)
    rng = np.random.default_rng(0)
    layers = []
    for shape in SHAPES:
        statistics = {"tokens": rng.integers(100, 900, 16).astype(float), "max_abs": rng.gamma(2.0, size=16)}
        base = rng.gamma(2.0, size=16)
        statistics |= {f"relative_error.expert.{bits}": base * 4.0**-bits for bits in (1, 2, 3, 4, 8)}
        layers.append(LayerScores(shape.layer, 16, 4, 2000, 0.0, statistics, 1.0))
    scores = Scores(layers, {"quantize": measured_settings(config)})
    plan = plan_quantize(config, SHAPES, scores, fixed_bytes=FIXED, num_decoder_layers=4)
    expected = reach(config, SHAPES, FIXED, "plugin").expert_bytes
    assert FIXED + expected == pytest.approx(FIXED + plan.expert_bytes, rel=0.01)


def test_a_budget_in_bytes_is_what_it_leads_to() -> None:
    low, high = reach(quantize(average_bits=3), SHAPES, FIXED, "plugin").ranges["stored_bytes"]
    between = round((low + high) / 2)
    assert reach(quantize(stored_bytes=between), SHAPES, FIXED, "plugin").expert_bytes == between - FIXED
    assert reach(quantize(stored_bytes=10 * round(high)), SHAPES, FIXED, "plugin").expert_bytes == high - FIXED


def test_minimum_counts_raise_the_least() -> None:
    """Of 16 experts one at 4 bits and 15 at 2: 34 / 16 bits; more than there are is refused."""
    counts = {"minimum_counts": {"4": 1}, "options": [2, 4]}
    assert reach(quantize(average_bits=3, **counts), SHAPES, FIXED, "plugin").ranges["average_bits"] == (2.125, 4.0)
    dropping = reach(quantize(average_bits=3, allow_drop=True, **counts), SHAPES, FIXED, "plugin")
    assert dropping.ranges["average_bits"] == ((4 + 3 * 2) / 16, 4.0)
    with pytest.raises(UsageError, match=r"2\.1 cannot be reached, 2\.125 is the least .* and minimum_counts"):
        reach(quantize(average_bits=2.1, **counts), SHAPES, FIXED, "plugin")
    with pytest.raises(UsageError, match="minimum_counts asks for 17 experts, and layer 0 has 16"):
        reach(quantize(average_bits=3, options=[2, 4], minimum_counts={"4": 9, "2": 8}), SHAPES, FIXED, "plugin")


@pytest.mark.parametrize(
    ("budget", "least"),
    [
        ({"average_bits": 1.5}, "2 is the least"),
        ({"stored_bytes": 1_000_100}, "is the least"),
        ({"active_bytes": 9}, ""),
    ],
)
def test_out_of_reach(budget: dict[str, Any], least: str) -> None:
    name = next(iter(budget))
    with pytest.raises(UsageError, match=f"{name}: .* cannot be reached, .*{least}"):
        reach(quantize(**budget, options=[2, 3, 4]), SHAPES, FIXED, "plugin")
