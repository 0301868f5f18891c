"""Allocations by rule of thumb, to compare the solved ones with: by layer, by expert usage, at random.

Each starts from the smallest allocation that keeps to the rules, with nothing dropped where that is possible, and gives
options with more bits to one item after another while the budget holds. None looks at a loss.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from moe_compress.compress.allocate_blame import explain
from moe_compress.compress.allocate_model import Model, allowed_options, common_options, groups, scheme_of
from moe_compress.compress.allocate_problem import DROP, Allocation, Budget, Item, Option, Rules, ceiling, check, total
from moe_compress.compress.allocate_program import OutOfTimeError, minimise
from moe_compress.errors import NoAllocationError

NO_RULES = Rules()
SECONDS_TO_START = 60.0
START_GAP = 1e-3
FAVOUR = 0.05  # how much cheaper, at most, the start counts a larger option of an item that comes first


def uniform_by_layer(items: Sequence[Item], budget: Budget, rules: Rules = NO_RULES) -> Allocation:
    """The same bits everywhere, and the next more for as many of the first layers as fit. Errors as `solve`."""
    last = max((item.layer for item in items if item.layer is not None), default=0) + 1
    order = sorted(range(len(items)), key=lambda item: last if items[item].layer is None else items[item].layer or 0)
    return _level_by_level("uniform_by_layer", items, budget, rules, order)


def by_frequency(items: Sequence[Item], usage: Sequence[float], budget: Budget, rules: Rules = NO_RULES) -> Allocation:
    """The same bits everywhere, and the next more for as many of the most used items as fit. Errors as `solve`.

    `usage` is one number per item, such as the tokens its expert saw.
    """
    assert len(usage) == len(items), "one usage per item"
    order = sorted(range(len(items)), key=lambda item: -usage[item])
    return _level_by_level("by_frequency", items, budget, rules, order)


def random_allocation(items: Sequence[Item], budget: Budget, rules: Rules = NO_RULES, seed: int = 0) -> Allocation:
    """More bits for items drawn at random, one option up at a time, while the budget holds. Errors as `solve`."""
    started = time.perf_counter()
    rng = np.random.default_rng(seed)
    state = _State(items, budget, rules, rng.permutation(len(items)).tolist())
    moves = np.repeat(np.arange(len(state.units)), [len(levels) - 1 for _, levels in state.units])
    for unit in rng.permutation(moves).tolist():
        state.upgrade(unit)
    state.fill(rng.permutation(len(state.units)).tolist())
    return state.allocation(f"random seed {seed}", started)


def _level_by_level(name: str, items: Sequence[Item], budget: Budget, rules: Rules, order: Sequence[int]) -> Allocation:
    started = time.perf_counter()
    state = _State(items, budget, rules, order)
    units = range(len(state.units))
    for level in range(1, max((len(levels) for _, levels in state.units), default=1)):
        for unit in units:
            if state.level[unit] < level:
                state.upgrade(unit)
    state.fill(units)
    return state.allocation(name, started)


class _State:
    """An allocation that grows: what is chosen, what it costs, and which units can still go up.

    A unit is the items that must share an option (one item unless a rule says otherwise) and their options, the
    smallest first. Units stand in the order of their first items in `order`.
    """

    def __init__(self, items: Sequence[Item], budget: Budget, rules: Rules, order: Sequence[int]) -> None:
        check(items, budget, rules)
        self.items, self.rules, self.limits = items, rules, budget.limits()
        self.chosen = _start(items, budget, rules, order)
        self.used = {name: _sum(name, items, self.chosen) for name in self.limits}
        weights = sum(item.num_weights for item in items)
        self.most = {
            name: ceiling(name, limit) * (weights if name == "average_bits" else 1)
            for name, limit in self.limits.items()
        }
        taking = ((item.layer, option.name) for item, option in zip(items, self.chosen, strict=True))
        self.counts = Counter(taking)
        self.units = list(_units(items, rules, self.chosen, order))
        self.level = [levels.index(self.chosen[members[0]].name) for members, levels in self.units]

    def upgrade(self, unit: int) -> bool:
        """Take a unit's next option if budget and rules hold then."""
        members, levels = self.units[unit]
        if self.level[unit] + 1 == len(levels):
            return False
        after = [_option(self.items[item], levels[self.level[unit] + 1]) for item in members]
        before = [self.chosen[item] for item in members]
        part = [self.items[item] for item in members]
        used = {name: self.used[name] + _sum(name, part, after) - _sum(name, part, before) for name in self.limits}
        if any(used[name] > self.most[name] for name in self.limits):
            return False
        leaving = Counter((item.layer, option.name) for item, option in zip(part, before, strict=True))
        for (layer, name), count in leaving.items():
            if layer is not None and self.counts[layer, name] - count < self.rules.minimum_counts.get(name, 0):
                return False
        self.counts -= leaving
        self.counts += Counter((item.layer, option.name) for item, option in zip(part, after, strict=True))
        self.used = used
        self.level[unit] += 1
        for item, option in zip(members, after, strict=True):
            self.chosen[item] = option
        return True

    def fill(self, order: Sequence[int]) -> None:
        """Go up wherever it still fits, until nothing does."""
        while [unit for unit in order if self.upgrade(unit)]:
            pass

    def allocation(self, name: str, started: float) -> Allocation:
        """What was chosen; the bound is the trivial one, for nothing is proven."""
        loss = total(self.items, self.chosen, "loss")
        return Allocation(
            chosen=tuple(option.name for option in self.chosen),
            loss=loss,
            stored_bytes=int(total(self.items, self.chosen, "stored_bytes")),
            active_bytes=total(self.items, self.chosen, "active_bytes"),
            average_bits=total(self.items, self.chosen, "average_bits"),
            optimal=False,
            gap=1.0 if loss > 0 else 0.0,
            relaxation_bound=0.0,
            shadow_prices={},
            solver=name,
            seconds=time.perf_counter() - started,
        )


def _start(items: Sequence[Item], budget: Budget, rules: Rules, order: Sequence[int]) -> list[Option]:
    """The smallest allocation; what the rules demand beyond it goes to the items that come first in `order`."""
    metric = next(iter(budget.limits()))
    rank = np.empty(len(items))
    rank[list(order)] = np.arange(len(items)) / len(items)
    for tried in (_keeping(items, rules), rules):
        model = Model(items, tried)
        values = model.values(metric)
        program, _, _ = model.program(values * (1 - FAVOUR + FAVOUR * rank[model.item_of]), budget.limits())
        try:
            solution = minimise(program, START_GAP, SECONDS_TO_START)
        except OutOfTimeError:
            raise NoAllocationError(
                f"no allocation to begin with was found in {SECONDS_TO_START} s; loosen the budget."
            ) from None
        if solution is not None:
            return model.chosen(solution.values)
    raise NoAllocationError(explain(items, budget, rules))


def _keeping(items: Sequence[Item], rules: Rules) -> Rules:
    """The rules, and nothing is dropped but what the pins leave nothing else to."""
    pins = dict(rules.pins)
    for members in groups(items):
        allowed = {items[item].name: tuple(allowed_options(items[item], rules)) for item in members}
        if all(set(names) != {DROP} for names in allowed.values()):
            pins |= {item: tuple(name for name in names if name != DROP) for item, names in allowed.items()}
    return replace(rules, pins=pins)


def _units(
    items: Sequence[Item], rules: Rules, chosen: Sequence[Option], order: Sequence[int]
) -> Iterator[tuple[list[int], list[str]]]:
    allowed = [allowed_options(item, rules) for item in items]
    found: dict[tuple[str, int | None], list[int]] = {}
    for item in order:
        if chosen[item].name != DROP:
            has_scheme, scheme = scheme_of(items[item], rules)
            found.setdefault(("scheme", scheme) if has_scheme else ("item", item), []).append(item)
    for members in found.values():
        first = items[members[0]]
        names = common_options(allowed, members)
        yield members, sorted(names, key=lambda name: _size(_option(first, name)))


def _size(option: Option) -> tuple[float, int, float]:
    return option.bits, option.stored_bytes, option.active_bytes


def _option(item: Item, name: str) -> Option:
    return next(option for option in item.options if option.name == name)


def _sum(metric: str, items: Sequence[Item], chosen: Sequence[Option]) -> float:
    """A budget's quantity, weighted bits for `average_bits`."""
    if metric == "average_bits":
        return sum(option.bits * item.num_weights for item, option in zip(items, chosen, strict=True))
    return float(sum(getattr(option, metric) for option in chosen))
