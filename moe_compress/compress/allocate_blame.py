"""Why an allocation is impossible: by how much a budget is missed, and which pin or rule stands in the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from moe_compress.compress.allocate_model import Model
from moe_compress.compress.allocate_problem import Budget, Item, Rules, ceiling, total
from moe_compress.compress.allocate_program import ROUNDING, OutOfTimeError, minimise
from moe_compress.settings import shown_budget

NO_RULES = Rules()
SECONDS_PER_QUESTION = 20.0
NAMES_SHOWN = 3


@dataclass(frozen=True)
class _Least:
    """The least that a quantity can be: at least `low`; `high` was reached. Both infinite where nothing is possible.

    They differ where a search ran out of time.
    """

    low: float
    high: float

    def misses(self, metric: str, limit: float) -> bool:
        """Whether it is proven to lie above a limit."""
        return self.low > ceiling(metric, limit)

    def keeps(self, metric: str, limit: float) -> bool:
        """Whether something keeps to a limit."""
        return self.high <= ceiling(metric, limit)


def explain(items: Sequence[Item], budget: Budget, rules: Rules) -> str:
    """One sentence on a problem that has no solution: what is missed, what is to blame, and what to do."""
    if _least(items, rules, "stored_bytes", {}).low == math.inf:
        return _contradiction(items, rules)
    limits, judged = budget.limits(), True
    together = [dict(list(limits.items())[:count]) for count in range(1, len(limits))]
    for held in ({}, *together):
        for name, limit in limits.items():
            if name in held:
                continue
            least = _least(items, rules, name, held)
            if least.misses(name, limit):
                return _missed(items, rules, name, limit, least, held)
            judged = judged and least.keeps(name, limit)
    asked = " and ".join(f"{name}: {shown_budget(name, limit)}" for name, limit in limits.items())
    if judged:
        return f"{asked} is at the very edge of what is possible; raise it a little."
    rest = " or ".join(_words(rules, name) for name in _set_rules(rules))
    return f"{asked} cannot be reached, and why was not found in time; raise it{rest and f', or loosen {rest}'}."


def _contradiction(items: Sequence[Item], rules: Rules) -> str:
    said = "the rules cannot hold together, whatever the budget: loosen"
    found = list(_without_each(items, rules, "stored_bytes", {}))
    culprits = [name for name, least in found if least.high < math.inf]
    if culprits:
        return f"{said} {' or '.join(_name_of(items, rules, name, {}) for name in culprits)}."
    several = "at least two" if all(least.low == math.inf for _, least in found) else "some"
    return f"{said} {several} of {', '.join(_words(rules, name) for name, _ in found)}."


def _missed(
    items: Sequence[Item], rules: Rules, metric: str, limit: float, least: _Least, held: Mapping[str, float]
) -> str:
    kept = " and ".join(f"{name}: {shown_budget(name, value)}" for name, value in held.items())
    beside = f" together with {kept}" if held else ""
    said = f"{metric}: {shown_budget(metric, limit)} cannot be reached{beside}"
    if least.low < math.inf:
        said += f": the least possible is {shown_budget(metric, least.low, up=True)}"
    found = list(_without_each(items, rules, metric, held))
    culprits = [name for name, without in found if without.keeps(metric, limit)]
    if culprits:
        named = " or ".join(_name_of(items, rules, name, {**held, metric: limit}) for name in culprits)
        return f"{said}; raise it, or loosen {named}."
    names = [_words(rules, name) for name, _ in found]
    if not all(without.misses(metric, limit) for _, without in found):
        return f"{said}; raise it, or try to loosen {' or '.join(names)} (time ran out before it was known which)."
    free = _least(items, NO_RULES, metric, held)
    if free.keeps(metric, limit):
        return f"{said}; raise it, or loosen at least two of {', '.join(names)}."
    reason = ", and no pin or rule is to blame"
    if free.low < least.low:
        known = free.low >= 0
        reason = f", and without any pin or rule it is {shown_budget(metric, free.low, up=True)}" if known else ""
    return f"{said}{reason}; raise it, or offer smaller options."


def _without_each(
    items: Sequence[Item], rules: Rules, metric: str, held: Mapping[str, float]
) -> Iterator[tuple[str, _Least]]:
    """The least of a quantity without each of the rules."""
    for name in _set_rules(rules):
        yield name, _least(items, replace(rules, **{name: getattr(NO_RULES, name)}), metric, held)


def _name_of(items: Sequence[Item], rules: Rules, name: str, limits: Mapping[str, float]) -> str:
    """A rule in words; of the pins, the fewest that make a solution possible when they are loosened."""
    if name != "pins":
        return _words(rules, name)
    model = Model(items, replace(rules, pins={}))
    pinned = [rules.pins.get(item.name) for item in items]
    outside = [
        float(allowed is not None and option.name not in allowed)
        for allowed, option in (
            (pinned[item], option) for item, option in zip(model.item_of, model.options, strict=True)
        )
    ]
    names = list(rules.pins)
    try:
        solution = minimise(model.program(np.array(outside), limits)[0], 0.0, SECONDS_PER_QUESTION)
    except OutOfTimeError:
        solution = None
    if solution is not None:
        names = [
            item.name
            for item, allowed, option in zip(items, pinned, model.chosen(solution.values), strict=True)
            if allowed is not None and option.name not in allowed
        ]
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    shown = [(item, " or ".join(rules.pins[item])) for item in names[:NAMES_SHOWN]]
    if rules.pinned_by:
        return f"{rules.pinned_by} (pins {', '.join(f'`{item}` to {options}' for item, options in shown)}{more})"
    listed = ", ".join(f"`{item}` ({options})" for item, options in shown)
    return f"the pin{'s' if len(names) > 1 else ''} on {listed}{more}"


def _words(rules: Rules, name: str) -> str:
    value = getattr(rules, name)
    if name == "pins":
        return rules.pinned_by or name
    if value is True:
        return name
    more = ", ..." if len(value) > NAMES_SHOWN else ""
    said = "how many experts a layer may lose" if name == "max_drops_per_layer" else name
    return f"{said} ({', '.join(f'{key}: {count}' for key, count in list(value.items())[:NAMES_SHOWN])}{more})"


def _least(items: Sequence[Item], rules: Rules, metric: str, limits: Mapping[str, float]) -> _Least:
    """The least a budget's quantity can be under rules and other budgets."""
    model = Model(items, rules)
    program, scale, _ = model.program(model.values(metric), limits)
    try:
        solution = minimise(program, 0.0, SECONDS_PER_QUESTION)
    except OutOfTimeError:
        return _Least(-math.inf, math.inf)
    if solution is None:
        return _Least(math.inf, math.inf)
    high = total(items, model.chosen(solution.values), metric)
    if solution.objective - solution.bound <= ROUNDING * (1 + solution.objective + program.offset):
        return _Least(high, high)
    weights = sum(item.num_weights for item in items) if metric == "average_bits" else 1
    return _Least((solution.bound + program.offset) * scale / weights, high)


def _set_rules(rules: Rules) -> list[str]:
    return [rule.name for rule in fields(rules) if rule.name != "pinned_by" and getattr(rules, rule.name)]
