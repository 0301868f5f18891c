"""Plans of bits against numbers worked out by hand: bytes, losses, pins, priors, and budgets that are held exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.compress.prune.plan import super_experts
from moe_compress.compress.quantize import plan as plan_module
from moe_compress.compress.quantize.config import QuantizeConfig
from moe_compress.compress.quantize.plan import (
    DROP,
    FEW_TOKENS,
    KEEP,
    WHOLE,
    ExpertShapes,
    QuantizePlan,
    expert_costs,
    matrix_bytes,
    measured_settings,
    option_bits,
    plan_quantize,
)
from moe_compress.compress.quantize.storage import scheme_of
from moe_compress.errors import DataError, NoAllocationError, UsageError
from moe_compress.settings import parse_size

EXPERTS, LAYERS, TOP_K = 6, 3, 2
PROJECTIONS = {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
WEIGHTS = 3 * 16 * 32
OTHER = 70  # bytes of an expert's router rows and biases
FIXED = 5000


def config(**settings: Any) -> QuantizeConfig:
    given = {"op": "quantize", "method": "rtn", "options": [1, 2, 3, 4], "group_size": 16}
    return QuantizeConfig.model_validate(given | settings)


def shapes() -> list[ExpertShapes]:
    return [ExpertShapes(layer, EXPERTS, TOP_K, PROJECTIONS, 2, OTHER) for layer in range(LAYERS)]


def scores(seed: int = 0, **changes: Any) -> Scores:
    """Random costs that fall with the bits, of a thousand tokens per layer."""
    rng = np.random.default_rng(seed)
    layers = []
    for layer in range(LAYERS):
        tokens = rng.integers(50, 900, EXPERTS).astype(float)
        statistics = {
            "tokens": tokens,
            "gate_sum": tokens * rng.uniform(0.2, 0.8, EXPERTS),
            "max_abs": rng.uniform(1, 2, EXPERTS),
        }
        for part in (WHOLE, *PROJECTIONS):
            base = rng.uniform(1, 30, EXPERTS) * tokens
            for bits in range(1, 9):
                statistics[f"relative_error.{part}.{bits}"] = base * 4.0**-bits * rng.uniform(0.9, 1.1, EXPERTS)
                statistics[f"error.{part}.{bits}"] = base * 4.0**-bits * rng.uniform(5, 50, EXPERTS)
        statistics[f"relative_error.{WHOLE}.{DROP}"] = rng.uniform(1, 30, EXPERTS) * tokens
        layers.append(LayerScores(layer, EXPERTS, TOP_K, 1000, 0.9, statistics | changes, 1e4 * (layer + 1)))
    return Scores(layers, {})


def planned(settings: dict[str, Any], found: Scores | None = None, tier: str = "plugin") -> QuantizePlan:
    wanted = config(**settings)
    measured = found or scores()
    measured.fingerprint["quantize"] = measured_settings(wanted)
    return plan_quantize(wanted, shapes(), measured, fixed_bytes=FIXED, num_decoder_layers=LAYERS, tier=tier)


def bytes_of(plan: QuantizePlan) -> int:
    """What the checkpoint then holds, from the schemes that are written."""
    total = FIXED
    for layer in plan.layers:
        total += OTHER * len(layer.keep)
        for part, options in layer.options.items():
            for option in options:
                rows, columns = PROJECTIONS[part]
                dense = rows * columns * 2
                total += dense if option == KEEP else scheme_of(option, plan.config).stored_bytes(
                    rows, columns, torch.bfloat16
                )  # fmt: skip
    return total


# ---------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 96), (33, 64), (48, 160), (5, 2048)])
def test_bytes_of_a_matrix_are_those_of_its_tensors(rows: int, columns: int, scale_dtype: torch.dtype) -> None:
    options = [*map(str, range(1, 9)), "nf4", "fp4", "int8"]
    for size in (8, 16, 32, "channel"):
        for symmetric in (True, False):
            settings = config(group_size=size, symmetric=symmetric, average_bits=3)
            for option in options:
                expected = scheme_of(option, settings).stored_bytes(rows, columns, scale_dtype)
                assert matrix_bytes(option, rows, columns, settings, scale_dtype.itemsize) == expected
            assert matrix_bytes(KEEP, rows, columns, settings, scale_dtype.itemsize) == rows * columns * (
                scale_dtype.itemsize
            )
            assert matrix_bytes(DROP, rows, columns, settings, scale_dtype.itemsize) == 0


# --------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("exponents", [None, {"alpha": 0.5, "beta": 2.0, "gamma": 1.5}])
def test_pmq_is_the_papers_product(exponents: dict[str, float] | None) -> None:
    """phi^alpha w^beta eps^gamma, phi and w as shares of the layer, eps the root of the error."""
    layer = scores().layers[1]
    alpha, beta, gamma = (exponents or {"alpha": 1, "beta": 1, "gamma": 2}).values()
    found, few = expert_costs(config(average_bits=2, cost=exponents or "pmq"), layer, WHOLE, "2")
    tokens, gates, error = (layer.statistics[name] for name in ("tokens", "gate_sum", f"error.{WHOLE}.2"))
    for expert in range(EXPERTS):
        phi, w, eps = tokens[expert] / sum(tokens), gates[expert] / sum(gates), error[expert] ** 0.5
        assert found[expert] == pytest.approx(phi**alpha * w**beta * eps**gamma, rel=1e-12)
    assert few == []
    released, _ = expert_costs(config(average_bits=2, cost="pmq_as_released"), layer, WHOLE, "2")
    np.testing.assert_allclose(
        released, tokens / tokens.sum() * (gates / gates.sum()) ** 1.5 * np.sqrt(error), rtol=1e-12
    )


def test_output_error_is_relative_to_the_stream() -> None:
    layer = scores().layers[2]
    found, _ = expert_costs(config(average_bits=2), layer, "up_proj", "3")
    np.testing.assert_array_equal(found, layer.statistics["relative_error.up_proj.3"])
    assert expert_costs(config(average_bits=2), layer, "up_proj", KEEP)[0].tolist() == [0.0] * EXPERTS


def test_starved_experts_take_the_prior() -> None:
    tokens = np.array([100.0, 0.0, FEW_TOKENS - 1, FEW_TOKENS, 300.0, 50.0])
    error = np.array([10.0, 0.0, 99.0, 4.0, 60.0, 5.0])
    layer = scores(**{"tokens": tokens, f"relative_error.{WHOLE}.2": error}).layers[0]
    found, few = expert_costs(config(average_bits=2), layer, WHOLE, "2")
    per_token = error.sum() / tokens.sum()
    assert few == [1, 2]
    np.testing.assert_allclose(found, [10, per_token, per_token * FEW_TOKENS, 4, 60, 5], rtol=1e-12)
    assert error[1] == 0.0, "the scores stay as they were"


def test_costs_that_are_missing_or_no_numbers() -> None:
    with pytest.raises(UsageError, match="no relative fisher for 2 bits of expert; score again"):
        expert_costs(config(average_bits=2, cost="fisher"), scores().layers[0], WHOLE, "2")
    broken = scores(**{f"relative_error.{WHOLE}.2": np.array([1, 2, np.nan, 1, 1, 1])})
    with pytest.raises(DataError, match="layer 0, expert 2 is not finite"):
        planned({"average_bits": 2}, broken)


# ---------------------------------------------------------------------------------------------------- pins and budgets


@pytest.mark.parametrize("granularity", ["expert", "projection", "layer"])
def test_super_experts_get_eight_bits(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "super_experts", lambda scores, layers: {(0, 3), (2, 1)})
    settings = {"average_bits": 4, "granularity": granularity, "allow_drop": granularity != "layer"}
    plan = planned(settings)
    assert plan.average_bits <= 4
    eight = {
        (layer.layer, expert)
        for layer in plan.layers
        for expert, options in zip(layer.keep, zip(*layer.options.values(), strict=True), strict=True)
        if set(options) == {"8"}
    }
    assert eight == {(0, 3), (2, 1)}
    free = planned(settings | {"protect_super_experts": False})
    assert not any("8" in options for layer in free.layers for options in layer.options.values())


def test_who_is_a_super_expert_is_asked_of_the_scores() -> None:
    found = scores()
    found.layers[0].statistics["max_abs"][4] = 1e4
    assert super_experts(found, LAYERS) == {(0, 4)}  # by the definition of arXiv 2507.23279
    plan = planned({"average_bits": 3}, found)
    assert {options[4] for options in plan.layers[0].options.values()} == {"8"}


@pytest.mark.parametrize("granularity", ["expert", "projection", "layer"])
@pytest.mark.parametrize("drop", [False, True])
def test_budgets_are_held_exactly(granularity: str, drop: bool) -> None:
    if granularity == "layer" and drop:
        return
    settings = {"granularity": granularity, "allow_drop": drop, "protect_super_experts": False}
    full = FIXED + LAYERS * EXPERTS * (2 * WEIGHTS + OTHER)
    for share in (0.25, 0.3, 0.35):
        plan = planned(settings | {"stored_bytes": round(share * full)})
        assert bytes_of(plan) == FIXED + plan.expert_bytes <= round(share * full)
        better = planned(settings | {"stored_bytes": round(share * full) + 500})
        assert better.allocation and plan.allocation
        assert better.allocation["loss"] <= plan.allocation["loss"] + 1e-12
    for bits in (1.5, 2.0, 2.7):
        plan = planned(settings | {"average_bits": bits})
        used = sum(
            option_bits(option) * np.prod(PROJECTIONS[part])
            for layer in plan.layers
            for part, options in layer.options.items()
            for option in options
        ) / (LAYERS * EXPERTS * WEIGHTS)
        assert plan.average_bits == pytest.approx(used) and used <= bits + 1e-12
    for layer in plan.layers:
        assert len(layer.keep) >= TOP_K and all(len(found) == len(layer.keep) for found in layer.options.values())


def test_an_expert_goes_as_a_whole() -> None:
    cheap = scores(**{f"relative_error.{WHOLE}.{DROP}": np.array([1e9, 0.0, 1e9, 0.0, 0.0, 0.0])})
    for granularity in ("expert", "projection"):
        plan = planned({"average_bits": 2, "allow_drop": True, "granularity": granularity}, cheap)
        assert all({0, 2} <= set(layer.keep) for layer in plan.layers) and plan.num_dropped > 0
        assert all(DROP not in options for layer in plan.layers for options in layer.options.values())


def test_keep_is_an_option() -> None:
    plan = planned({"average_bits": 9, "keep_option": True, "options": [2, 4], "protect_super_experts": False})
    chosen = {option for layer in plan.layers for options in layer.options.values() for option in options}
    assert KEEP in chosen and plan.average_bits <= 9


def test_stock_has_equal_drops_and_one_scheme() -> None:
    plan = planned({"average_bits": 2.5, "allow_drop": True, "options": [2, 3, 4], "protect_super_experts": False},
                   tier="stock")  # fmt: skip
    assert len({len(layer.keep) for layer in plan.layers}) == 1
    assert len({option for layer in plan.layers for options in layer.options.values() for option in options}) == 1


def test_stored_bytes_in_stock_count_the_noted_shapes() -> None:
    settings = {"allow_drop": True, "options": [4], "protect_super_experts": False}
    expert = 3 * (16 * 32 // 2 + 16 * 32 // 16 * 2 + 16) + OTHER
    for kept in (3, 4, 5):
        for missing in (0, 1):
            budget = FIXED + LAYERS * kept * expert - missing
            plan = planned(settings | {"stored_bytes": budget}, tier="stock")
            assert {len(layer.keep) for layer in plan.layers} == {kept - missing}
            assert bytes_of(plan) + 16 * 3 * LAYERS * (kept - missing) <= budget


def test_minimum_counts() -> None:
    plan = planned({"average_bits": 2, "options": [1, 2, 3], "minimum_counts": {"3": 2, "2": 1},
                    "protect_super_experts": False})  # fmt: skip
    for layer in plan.layers:
        options = list(layer.options["down_proj"])
        assert options.count("3") >= 2 and options.count("2") >= 1


@pytest.mark.parametrize(
    "settings",
    [{"average_bits": 0.5}, {"stored_bytes": FIXED}, {"active_bytes": 1}],
    ids=lambda found: next(iter(found)),
)
def test_budgets_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        planned(settings)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("granularity", ["expert", "projection", "layer"])
def test_super_experts_and_minimum_counts_are_blamed(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """18 experts at 1 bit but for one at 8: (17 + 8) / 18 = 1.389 bits."""
    monkeypatch.setattr(plan_module, "super_experts", lambda scores, layers: {(0, 3)})
    settings = {"average_bits": 1.2, "granularity": granularity}
    with pytest.raises(NoAllocationError) as caught:
        planned(settings)
    part = " gate_proj" if granularity == "projection" else ""
    assert "1.2 cannot be reached: the least possible is 1.389;" in str(caught.value)
    assert f"loosen protect_super_experts (pins `layer 0 expert 3{part}` to 8" in str(caught.value)
    if granularity == "expert":
        counts = {"minimum_counts": {"3": 1}}  # alone (18 + 3 * 2) / 18 = 1.333
        with pytest.raises(NoAllocationError, match=r"at least two of protect_super_experts, minimum_counts .3: 1."):
            planned(settings | counts)
        with pytest.raises(NoAllocationError, match=r"loosen protect_super_experts .* or minimum_counts .3: 1.\.$"):
            planned(settings | counts | {"average_bits": 1.4})


def test_a_missed_size_is_that_of_the_checkpoint_in_both_tiers() -> None:
    settings = {"options": [2, 3], "protect_super_experts": False}
    for tier in ("stock", "plugin"):
        with pytest.raises(
            NoAllocationError, match=r"stored_bytes: 5\.1KB cannot be reached: .* is (\d+\.\d+)KB"
        ) as caught:
            planned({"stored_bytes": 5100} | settings, tier=tier)
        least = parse_size(str(caught.value).partition("least possible is ")[2].split(",")[0])
        plan = planned({"stored_bytes": least} | settings, tier=tier)
        assert plan.average_bits == 2 and bytes_of(plan) <= least


def test_groups_of_the_router_forbid_drops() -> None:
    wanted, measured = config(average_bits=2, allow_drop=True), scores()
    measured.fingerprint["quantize"] = measured_settings(wanted)
    with pytest.raises(UsageError, match="2 groups"):
        plan_quantize(wanted, shapes(), measured, fixed_bytes=0, num_decoder_layers=3, num_groups=2)


def test_costs_of_another_way_to_quantize_do_not_serve() -> None:
    wanted, measured = config(average_bits=2), scores()
    with pytest.raises(UsageError, match="hold no costs"):
        plan_quantize(wanted, shapes(), measured, fixed_bytes=0, num_decoder_layers=3)
    measured.fingerprint["quantize"] = measured_settings(wanted) | {"group_size": 999}
    with pytest.raises(UsageError, match="group_size: 999"):
        plan_quantize(wanted, shapes(), measured, fixed_bytes=0, num_decoder_layers=3)


def test_rules_to_compare_with_hold_the_budget_too() -> None:
    for allocation in ("frequency", "layer", "random"):
        plan = planned({"average_bits": 2.5, "allocation": allocation, "options": [2, 3]})
        assert 2.2 < plan.average_bits <= 2.5


def test_stock_drops_no_super_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scheme holds there, so they cannot have eight bits of their own."""
    monkeypatch.setattr(plan_module, "super_experts", lambda scores, layers: {(1, 3)})
    free = scores(**{f"relative_error.{WHOLE}.{DROP}": np.array([1e9, 1e9, 1e9, 0.0, 1e9, 1e9])})
    plan = planned({"average_bits": 3.4, "allow_drop": True, "options": [4]}, free, tier="stock")
    assert [3 in layer.keep for layer in plan.layers] == [False, True, False]
