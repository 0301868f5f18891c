"""Allocations: against brute force and dynamic programming, the relaxation, the messages, the rules of thumb."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.compress import allocate_blame, allocate_program
from moe_compress.compress.allocate import (
    Allocation,
    Budget,
    Item,
    Option,
    Rules,
    by_frequency,
    frontier,
    random_allocation,
    solve,
    uniform_by_layer,
)
from moe_compress.compress.allocate_problem import total
from moe_compress.errors import UsageError

NAMES = ("2", "3", "4")


def make(
    seed: int, *, layers: int = 2, experts: int = 2, projections: int = 1, drop: bool = False, names: Any = NAMES
) -> list[Item]:
    """Items whose bytes and losses do not follow a pattern."""
    rng = np.random.default_rng(seed)
    items = []
    for layer, expert, projection in itertools.product(range(layers), range(experts), range(projections)):
        weights = int(rng.integers(50, 200))
        usage = float(rng.uniform(0.1, 2))
        options = []
        for name in names:
            stored = int(weights * int(name) + rng.integers(0, 30))
            loss = usage * 4.0 ** -int(name) * float(rng.uniform(0.5, 2))
            options.append(Option(name, int(name), stored, stored * usage, loss))
        if drop:
            options.append(Option("drop", 0, 0, 0.0, usage * float(rng.uniform(0.05, 0.6))))
        items.append(Item(f"l{layer}.e{expert}.p{projection}", layer, weights, tuple(options), expert))
    return items


def keeps(items: list[Item], chosen: tuple[Option, ...], budget: Budget, rules: Rules) -> bool:
    """Whether an allocation is allowed, said as the documentation says it."""
    names = [option.name for option in chosen]
    weights = sum(item.num_weights for item in items)
    bits = sum(option.bits * item.num_weights for item, option in zip(items, chosen, strict=True)) / weights
    if budget.average_bits is not None and bits > budget.average_bits * (1 + 1e-9):
        return False
    if budget.stored_bytes is not None and sum(option.stored_bytes for option in chosen) > budget.stored_bytes:
        return False
    active = sum(option.active_bytes for option in chosen)
    if budget.active_bytes is not None and active > budget.active_bytes * (1 + 1e-9):
        return False
    for item, name in zip(items, names, strict=True):
        if name not in rules.pins.get(item.name, (name,)):
            return False
    dropped: dict[int, dict[int, set[bool]]] = {}
    for item, name in zip(items, names, strict=True):
        if item.layer is not None and item.expert is not None:
            dropped.setdefault(item.layer, {}).setdefault(item.expert, set()).add(name == "drop")
    if any(len(states) > 1 for layer in dropped.values() for states in layer.values()):
        return False
    drops = {layer: sum(True in states for states in experts.values()) for layer, experts in dropped.items()}
    if any(drops.get(layer, 0) > most for layer, most in rules.max_drops_per_layer.items()):
        return False
    if rules.equal_drops and len(set(drops.values())) > 1:
        return False
    for layer in {item.layer for item in items} - {None}:
        mine = [(item, name) for item, name in zip(items, names, strict=True) if item.layer == layer]
        for option, least in rules.minimum_counts.items():
            offers = any(option == other.name for item, _ in mine for other in item.options)
            if offers and sum(name == option for _, name in mine) < least:
                return False
        if rules.same_option_per_layer and len({name for _, name in mine} - {"drop"}) > 1:
            return False
    inside = {name for item, name in zip(items, names, strict=True) if item.layer is not None}
    return not (rules.same_option and len(inside - {"drop"}) > 1)


def brute_force(items: list[Item], budget: Budget, rules: Rules) -> float | None:
    losses = (
        math.fsum(option.loss for option in chosen)
        for chosen in itertools.product(*(item.options for item in items))
        if keeps(items, chosen, budget, rules)
    )
    return min(losses, default=None)


def options_of(items: list[Item], allocation: Allocation) -> tuple[Option, ...]:
    return tuple(
        next(option for option in item.options if option.name == name)
        for item, name in zip(items, allocation.chosen, strict=True)
    )


def spread(items: list[Item], metric: str, part: float) -> float:
    """A budget that far between all at their smallest and all at their largest option."""
    small, large = (
        total(items, [pick(item.options, key=lambda o: o.stored_bytes) for item in items], metric)
        for pick in (min, max)
    )
    return small + part * (large - small)


def agree(items: list[Item], budget: Budget, rules: Rules) -> Allocation | None:
    """Solve, and compare with every allocation there is."""
    best = brute_force(items, budget, rules)
    if best is None:
        with pytest.raises(UsageError):
            solve(items, budget, rules, gap=0.0)
        return None
    found = solve(items, budget, rules, gap=0.0)
    chosen = options_of(items, found)
    assert keeps(items, chosen, budget, rules)
    assert found.loss == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert found.loss == pytest.approx(math.fsum(option.loss for option in chosen))
    assert found.stored_bytes == sum(option.stored_bytes for option in chosen)
    assert found.relaxation_bound <= best * (1 + 1e-9)
    assert found.optimal and found.gap <= 1e-9
    return found


BUDGETS = {
    "bits": lambda items, part: Budget(average_bits=spread(items, "average_bits", part)),
    "stored": lambda items, part: Budget(stored_bytes=int(spread(items, "stored_bytes", part))),
    "active": lambda items, part: Budget(active_bytes=spread(items, "active_bytes", part)),
    "all": lambda items, part: Budget(
        spread(items, "average_bits", part + 0.1),
        int(spread(items, "stored_bytes", part)),
        spread(items, "active_bytes", part),
    ),
}
RULES = {
    "none": Rules(),
    "pins": Rules(pins={"l0.e1.p0": ("4",), "l1.e0.p0": ("2", "3")}),
    "minimum_counts": Rules(minimum_counts={"4": 1, "2": 1}),
    "max_drops": Rules(max_drops_per_layer={0: 1, 1: 0}),
    "equal_drops": Rules(equal_drops=True),
    "same_option": Rules(same_option=True),
    "same_option_per_layer": Rules(same_option_per_layer=True),
    "stock": Rules(same_option=True, equal_drops=True, max_drops_per_layer={0: 1, 1: 1}),
    "mixed": Rules(
        pins={"l0.e0.p0": ("drop", "3")}, minimum_counts={"4": 1}, max_drops_per_layer={1: 1}, equal_drops=True
    ),
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_equal_to_brute_force(budget: str, rules: str) -> None:
    solved = 0
    for seed in range(3):
        items = make(seed, experts=3, drop=True)
        found = agree(items, BUDGETS[budget](items, 0.25 + 0.15 * seed), RULES[rules])
        solved += found is not None
    assert solved


@pytest.mark.parametrize("rules", ["none", "equal_drops", "same_option", "same_option_per_layer"])
def test_projections_of_an_expert_drop_together(rules: str) -> None:
    drops = 0
    for seed in range(3):
        items = make(seed, projections=2, drop=True, names=("2", "4"))
        found = agree(items, BUDGETS["stored"](items, 0.3), RULES[rules])
        drops += found is not None and "drop" in found.chosen
    assert drops


def test_an_expert_that_cannot_drop_whole_stays() -> None:
    items = make(0, projections=2, drop=True, names=("2", "4"))
    items[0] = replace(items[0], options=items[0].options[:-1])
    found = agree(items, BUDGETS["stored"](items, 0.3), Rules())
    assert found is not None and "drop" not in found.chosen[:2]


def test_items_outside_layers_and_experts() -> None:
    items = make(3, drop=True)
    items.append(Item("embed", None, 100, (Option("8", 8, 800, 8.0, 0.01), Option("4", 4, 400, 4.0, 0.02))))
    items.append(
        Item("l0.attention", 0, 100, (Option("4", 4, 400, 400.0, 0.02), Option("keep", 16, 1600, 1600.0, 0.0)))
    )
    for rules in (Rules(), Rules(same_option_per_layer=True), Rules(minimum_counts={"keep": 1}, equal_drops=True)):
        agree(items, BUDGETS["stored"](items, 0.5), rules)
    agree([item for item in items if item.name != "l0.attention"], Budget(stored_bytes=2000), Rules(same_option=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from(sorted(BUDGETS)), st.sampled_from(sorted(RULES)))
def test_generated_instances(seed: int, part: float, budget: str, rules: str) -> None:
    items = make(seed, drop=seed % 2 == 0 or rules == "mixed")
    agree(items, BUDGETS[budget](items, part), RULES[rules])


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_dynamic_programming(seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = []
    for index in range(60):
        sizes = np.sort(rng.choice(np.arange(1, 60), 4, replace=False)).tolist()
        losses = np.sort(rng.random(4))[::-1].tolist()
        options = tuple(Option(str(size), size, size, 1.0, loss) for size, loss in zip(sizes, losses, strict=True))
        items.append(Item(str(index), None, 1, options))
    limit = int(spread(items, "stored_bytes", 0.3))
    best = np.zeros(limit + 1)
    for item in items:
        after = np.full(limit + 1, np.inf)
        for option in item.options:
            size = option.stored_bytes
            after[size:] = np.minimum(after[size:], best[: limit + 1 - size] + option.loss)
        best = after
    found = solve(items, Budget(stored_bytes=limit), gap=0.0)
    assert found.loss == pytest.approx(best[limit], rel=1e-9)
    assert found.relaxation_bound <= best[limit] * (1 + 1e-12)
    assert found.stored_bytes <= limit


@pytest.mark.parametrize("core", [1, 5, 20])
def test_the_core_gives_the_same(core: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        items = make(seed, layers=3, experts=8, projections=2, drop=True)
        budget = BUDGETS["all"](items, 0.35)
        rules = (Rules(), Rules(equal_drops=True), Rules(same_option=True))[seed]
        whole = solve(items, budget, rules, gap=0.0)
        with monkeypatch.context() as patch:
            patch.setattr(allocate_program, "CORE_COLUMNS", core)
            found = solve(items, budget, rules, gap=0.0)
        assert found.loss == pytest.approx(whole.loss, rel=1e-9)
        assert found.optimal


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_the_scale_of_the_losses_does_not_matter(factor: float) -> None:
    items = make(7, layers=3, experts=6, drop=True)
    scaled = [
        replace(item, options=tuple(replace(option, loss=option.loss * factor) for option in item.options))
        for item in items
    ]
    budget = BUDGETS["stored"](items, 0.3)
    first, second = solve(items, budget, gap=0.0), solve(scaled, budget, gap=0.0)
    assert second.loss == pytest.approx(first.loss * factor, rel=1e-9)
    assert second.relaxation_bound == pytest.approx(first.relaxation_bound * factor, rel=1e-6)
    assert second.shadow_prices["stored_bytes"] == pytest.approx(first.shadow_prices["stored_bytes"] * factor, rel=1e-6)


def test_a_forbidding_loss_is_never_paid() -> None:
    items = make(1, drop=True)
    items[0] = replace(items[0], options=(*items[0].options[:-1], Option("drop", 0, 0, 0.0, 1e30)))
    found = agree(items, BUDGETS["stored"](items, 0.4), Rules())
    assert found is not None and found.chosen[0] != "drop"


@pytest.mark.parametrize("metric", ["average_bits", "active_bytes", "stored_bytes"])
def test_shadow_prices_are_slopes_of_the_bound(metric: str) -> None:
    items = make(5, layers=3, experts=10)
    middle = spread(items, metric, 0.4)
    step = (spread(items, metric, 1.0) - spread(items, metric, 0.0)) * 0.03
    limits = [middle - step, middle, middle + step]
    budgets = [Budget(**{metric: int(limit) if metric == "stored_bytes" else limit}) for limit in limits]
    left, here, right = frontier(items, budgets, gap=0.0)
    above = (left.relaxation_bound - here.relaxation_bound) / (limits[1] - limits[0])
    below = (here.relaxation_bound - right.relaxation_bound) / (limits[2] - limits[1])
    # The bound is convex in the budget; whole bytes shift the limits by less than a hundredth of a step.
    assert 0 < below * 0.98 <= here.shadow_prices[metric] <= above * 1.02


def test_a_budget_that_does_not_bind_has_no_price() -> None:
    found = solve(make(0), Budget(stored_bytes=10**9))
    assert found.shadow_prices == {"stored_bytes": 0.0}
    assert found.gap == 0.0


def test_a_frontier_only_falls() -> None:
    items = make(2, layers=3, experts=6)
    found = frontier(items, [Budget(average_bits=bits) for bits in np.arange(2.0, 4.2, 0.25)], gap=0.0)
    losses = [allocation.loss for allocation in found]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    assert set(found[0].chosen) == {"2"}


@pytest.mark.parametrize("rules", ["none", "stock", "mixed"])
def test_cbc_takes_over(rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    items = make(4, drop=True)
    found = agree(items, BUDGETS["all"](items, 0.65), RULES[rules])
    assert found is not None and found.solver == "CBC"
    monkeypatch.undo()
    other = solve(items, BUDGETS["all"](items, 0.65), RULES[rules], gap=0.0)
    assert other.solver == "HiGHS"
    assert found.relaxation_bound == pytest.approx(other.relaxation_bound, rel=1e-6)


def test_a_wide_gap_is_told() -> None:
    items = make(9, layers=4, experts=10, drop=True)
    budget = BUDGETS["all"](items, 0.35)
    exact, loose = solve(items, budget, gap=0.0), solve(items, budget, gap=0.2)
    assert loose.relaxation_bound == pytest.approx(exact.relaxation_bound)
    assert loose.loss * (1 - loose.gap) <= exact.loss * (1 + 1e-9) <= loose.loss * (1 + 1e-9)
    assert loose.gap <= 0.2


def test_nothing_found_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise allocate_program.OutOfTimeError

    monkeypatch.setattr("moe_compress.compress.allocate.minimise", never)
    with pytest.raises(UsageError, match=r"no allocation was found within 3 s; loosen the budget"):
        solve(make(0), Budget(average_bits=3), time_limit=3)


def test_bytes_the_solver_let_slip_are_asked_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # A solver that ignores a part of a budget stands for tolerances on huge numbers.
    from moe_compress.compress import allocate

    items, limit = make(0, layers=2, experts=8), 0
    limit = int(spread(items, "stored_bytes", 0.4))
    original = allocate.minimise

    def careless(program: Any, *arguments: Any) -> Any:
        program.rhs[-1] *= 1.05
        return original(program, *arguments)

    monkeypatch.setattr(allocate, "minimise", careless)
    assert solve(items, Budget(stored_bytes=limit)).stored_bytes <= limit


PLAIN = make(0, layers=2, experts=2)
BAD_INPUT: list[tuple[list[Item], Budget, Rules, str]] = [
    ([], Budget(average_bits=3), Rules(), "there is nothing to allocate"),
    (PLAIN, Budget(), Rules(), "no budget is set; give average_bits, stored_bytes or active_bytes"),
    (PLAIN, Budget(average_bits=-1), Rules(), "average_bits: -1 is no budget"),
    (PLAIN, Budget(active_bytes=math.nan), Rules(), "active_bytes: nan is no budget"),
    (PLAIN, Budget(average_bits=3), Rules(pins={"l0.e0.p1": ("3",)}), "no item `l0.e0.p1`; did you mean `l0.e0.p0`"),
    (PLAIN, Budget(average_bits=3), Rules(pins={"l0.e0.p0": ()}), "`l0.e0.p0` is left without any option"),
    (PLAIN, Budget(average_bits=3), Rules(pins={"l0.e0.p0": ("5",)}), "no option `5`; it has 2, 3, 4"),
    (PLAIN, Budget(average_bits=3), Rules(minimum_counts={"5": 1}), "no item offers `5`; the options are 2, 3, 4"),
    (PLAIN, Budget(average_bits=3), Rules(minimum_counts={"3": -1}), "minimum_counts: 3: -1 is negative"),
    (PLAIN, Budget(average_bits=3), Rules(max_drops_per_layer={7: 1}), "no item is in layer 7"),
    (PLAIN, Budget(average_bits=3), Rules(max_drops_per_layer={0: -1}), "max_drops_per_layer: 0: -1 is negative"),
]


@pytest.mark.parametrize(("items", "budget", "rules", "message"), BAD_INPUT)
def test_wrong_input(items: list[Item], budget: Budget, rules: Rules, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        solve(items, budget, rules)
    assert message in str(caught.value)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -1.0])
def test_a_loss_that_is_no_loss(loss: float) -> None:
    items = [replace(PLAIN[0], options=(replace(PLAIN[0].options[0], loss=loss),))]
    with pytest.raises(UsageError, match=r"the loss of `l0\.e0\.p0` at `2` is"):
        solve(items, Budget(average_bits=3))


def even(*, experts: int = 4, drop: bool = False) -> list[Item]:
    """Two layers of equal experts of 100 weights, 2 and 4 bits."""
    options = (Option("2", 2, 25, 1.0, 1.0), Option("4", 4, 50, 2.0, 0.1))
    if drop:
        options = (*options, Option("drop", 0, 0, 0.0, 5.0))
    return [Item(f"l{layer}.e{e}", layer, 100, options, e) for layer in range(2) for e in range(experts)]


INFEASIBLE: list[tuple[list[Item], Budget, Rules, list[str]]] = [
    (
        even(),
        Budget(average_bits=1.2),
        Rules(),
        ["average_bits: 1.2 cannot be reached: the least possible is 2, and no pin or rule is to blame"],
    ),
    (
        even(),
        Budget(average_bits=2.3),
        Rules(pins={"l0.e1": ("4",), "l1.e2": ("4",)}),
        ["the least possible is 2.5; raise it, or loosen the pin on `l"],
    ),
    (
        even(),
        Budget(stored_bytes=210),
        Rules(minimum_counts={"4": 1}),
        ["stored_bytes: 210B cannot", "the least possible is 250B; raise it, or loosen minimum_counts (4: 1)."],
    ),
    (
        even(drop=True),
        Budget(active_bytes=4.0),
        Rules(max_drops_per_layer={0: 1, 1: 1}),
        [
            "active_bytes: 4B cannot",
            "least possible is 6B; raise it, or loosen how many experts a layer may lose (0: 1, 1: 1).",
        ],
    ),
    (
        even(),
        Budget(average_bits=1.2),
        Rules(minimum_counts={"4": 1}),
        ["the least possible is 2.5, and without any pin or rule it is 2; raise it, or offer smaller options."],
    ),
    (
        even(drop=True),
        Budget(stored_bytes=150),
        Rules(max_drops_per_layer={0: 0}, equal_drops=True),
        ["least possible is 200B; raise it, or loosen how many experts a layer may lose (0: 0) or equal_drops."],
    ),
    (
        even(),
        Budget(average_bits=3.0),
        Rules(pins={"l0.e1": ("4",)}, same_option=True),
        ["the least possible is 4; raise it, or loosen the pin on `l0.e1` (4) or same_option."],
    ),
    (
        even(),
        Budget(average_bits=2.9),
        Rules(pins={"l0.e1": ("4",)}, same_option_per_layer=True),
        ["the least possible is 3; raise it, or loosen the pin on `l0.e1` (4) or same_option_per_layer."],
    ),
    (
        even(),
        Budget(average_bits=3.0),
        Rules(pins={"l0.e1": ("4",), "l1.e3": ("2",)}, same_option=True),
        ["the rules cannot hold together, whatever the budget: loosen the pin on `l", "or same_option."],
    ),
    (
        even(),
        Budget(average_bits=3.0),
        Rules(minimum_counts={"4": 3, "2": 3}),
        ["the rules cannot hold together, whatever the budget: loosen minimum_counts (4: 3, 2: 3)."],
    ),
    (
        even(),
        Budget(average_bits=3.0),
        Rules(pins={"l0.e1": ("4",), "l0.e2": ("2",)}, same_option=True, same_option_per_layer=True),
        ["loosen the pin on `l0.e"],
    ),
    (
        even(),
        Budget(average_bits=3.0),
        Rules(minimum_counts={"4": 1, "2": 1}, same_option=True, same_option_per_layer=True),
        ["loosen minimum_counts (4: 1, 2: 1)."],
    ),
]


@pytest.mark.parametrize(("items", "budget", "rules", "messages"), INFEASIBLE)
def test_what_is_to_blame(items: list[Item], budget: Budget, rules: Rules, messages: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        solve(items, budget, rules)
    for message in messages:
        assert message in str(caught.value)


def test_a_search_out_of_time_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not found in time is neither impossible nor possible; a bound that is proven still counts."""
    rules, calls, slow = Rules(minimum_counts={"4": 1}), list[int](), set[int]()
    original = allocate_blame.minimise

    def hurried(program: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) in slow:
            raise allocate_program.OutOfTimeError
        return original(program, *arguments)

    monkeypatch.setattr(allocate_blame, "minimise", hurried)
    for late, said in (
        (
            set(range(99)),
            "stored_bytes: 210B cannot be reached, and why was not found in time; raise it, or loosen min",
        ),
        ({1}, "the least possible is 250B; raise it, or loosen minimum_counts (4: 1)."),  # whether anything is possible
        ({2}, "why was not found in time"),  # the least
        ({3}, "the least possible is 250B; raise it, or try to loosen minimum_counts (4: 1) (time ran out"),
    ):
        calls.clear()
        slow = late
        assert said in allocate_blame.explain(even(), Budget(stored_bytes=210), rules)


def test_what_nothing_can_reach_is_said_without_a_figure() -> None:
    rules, nothing = Rules(minimum_counts={"4": 1}), allocate_blame._Least(math.inf, math.inf)
    for metric, limit in (("stored_bytes", 210.0), ("average_bits", 2.0)):
        said = allocate_blame._missed(even(), rules, metric, limit, nothing, {"active_bytes": 9.0})
        assert "cannot be reached together with active_bytes: 9B; raise it" in said


def test_several_rules_at_once_are_to_blame() -> None:
    pins = {"l0.e1": ("4",), "l0.e2": ("2",)}
    rules = Rules(pins=pins, minimum_counts={"2": 4, "4": 1}, same_option=True)
    with pytest.raises(UsageError, match=r"loosen at least two of pins, minimum_counts .2: 4, 4: 1., same_option"):
        solve(even(), Budget(average_bits=3.0), rules)


def test_budgets_that_exclude_each_other() -> None:
    a = (Option("a", 2, 10, 100.0, 1.0), Option("b", 2, 100, 10.0, 1.0))
    with pytest.raises(UsageError) as caught:
        solve([Item("x", 0, 1, a)], Budget(stored_bytes=50, active_bytes=50.0))
    expected = "active_bytes: 50B cannot be reached together with stored_bytes: 50B: the least possible is 100B"
    assert expected in str(caught.value)


def test_many_pins_are_counted() -> None:
    with pytest.raises(UsageError, match=r"the pins on .* and 5 more"):
        solve(even(), Budget(average_bits=2.0), Rules(pins={item.name: ("4",) for item in even()}))


def heuristics(items: list[Item], budget: Budget, rules: Rules) -> list[Allocation]:
    usage = [max(option.active_bytes / max(option.stored_bytes, 1) for option in item.options) for item in items]
    found = [uniform_by_layer(items, budget, rules), by_frequency(items, usage, budget, rules)]
    return found + [random_allocation(items, budget, rules, seed) for seed in range(3)]


@pytest.mark.parametrize("rules", RULES)
def test_rules_of_thumb_keep_the_rules_and_fill_the_budget(rules: str) -> None:
    items = make(11, layers=2, experts=5, drop=True)
    budget = Budget(stored_bytes=int(spread(items, "stored_bytes", 0.75)))
    best = solve(items, budget, RULES[rules], gap=0.0)
    for found in heuristics(items, budget, RULES[rules]):
        chosen = options_of(items, found)
        assert keeps(items, chosen, budget, RULES[rules])
        assert found.loss >= best.loss * (1 - 1e-9)
        if not (RULES[rules].same_option or RULES[rules].same_option_per_layer):
            for index, item in enumerate(items):
                for option in item.options:
                    if option.bits == chosen[index].bits + 1:
                        other = (*chosen[:index], option, *chosen[index + 1 :])
                        assert not keeps(items, other, budget, RULES[rules]), "an upgrade was left out"


def test_rules_of_thumb_go_where_they_say() -> None:
    items, budget = even(), Budget(average_bits=2.5)
    assert uniform_by_layer(items, budget).chosen == ("4", "4", *["2"] * 6)
    usage = [0, 5, 1, 2, 9, 0, 3, 4]
    assert by_frequency(items, usage, budget).chosen == ("2", "4", "2", "2", "4", "2", "2", "2")
    wanted = Rules(minimum_counts={"4": 1})
    assert by_frequency(items, usage, budget, wanted).chosen == ("2", "4", "2", "2", "4", "2", "2", "2")
    drawn = [random_allocation(items, budget, Rules(), seed) for seed in range(12)]
    assert all(Counter(found.chosen) == {"2": 6, "4": 2} for found in drawn)
    assert len({found.chosen for found in drawn}) > 4
    assert random_allocation(items, budget, Rules(), 3).chosen == drawn[3].chosen


def test_rules_of_thumb_drop_only_where_they_must() -> None:
    items = even(drop=True)
    assert "drop" not in uniform_by_layer(items, Budget(average_bits=2.5)).chosen
    assert "drop" in uniform_by_layer(items, Budget(average_bits=1.5)).chosen
    pinned = Rules(pins={"l0.e0": ("drop",)})
    assert Counter(uniform_by_layer(items, Budget(average_bits=2.5), pinned).chosen)["drop"] == 1
    with pytest.raises(UsageError, match="cannot be reached"):
        uniform_by_layer(even(), Budget(average_bits=1.5))
