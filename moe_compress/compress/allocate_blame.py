"""Why an allocation is impossible: by how much a budget is missed, and which pin or rule stands in the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import numpy as np

from moe_compress.compress.allocate_model import Model
from moe_compress.compress.allocate_problem import Budget, Item, Option, Rules, ceiling, total
from moe_compress.compress.allocate_program import Floats, OutOfTimeError, minimise

NO_RULES = Rules()
SECONDS_PER_QUESTION = 20.0
NAMES_SHOWN = 3


def explain(items: Sequence[Item], budget: Budget, rules: Rules) -> str:
    """One sentence on a problem that has no solution: what is missed, what is to blame, and what to do."""
    if not _is_possible(items, rules):
        return _contradiction(items, rules)
    limits = budget.limits()
    for name, limit in limits.items():
        least = _least(items, rules, name, {})
        if least is not None and least > ceiling(name, limit):
            return _missed(items, rules, name, limit, least, {})
    held: dict[str, float] = {}
    for name, limit in limits.items():
        least = _least(items, rules, name, held)
        if least is not None and least > ceiling(name, limit):
            return _missed(items, rules, name, limit, least, held)
        held[name] = limit
    return "the budget is at the very edge of what is possible; raise it a little."


def _contradiction(items: Sequence[Item], rules: Rules) -> str:
    culprits = []
    for name in _set_rules(rules):
        if _is_possible(items, replace(rules, **{name: getattr(NO_RULES, name)})):
            culprits.append(_name_of(items, rules, name, {}))
    if culprits:
        return f"the rules cannot hold together, whatever the budget: loosen {' or '.join(culprits)}."
    names = _set_rules(rules)
    return f"the rules cannot hold together, whatever the budget: loosen at least two of {', '.join(names)}."


def _missed(
    items: Sequence[Item], rules: Rules, metric: str, limit: float, least: float, held: Mapping[str, float]
) -> str:
    kept = " and ".join(f"{name}: {_number(name, value)}" for name, value in held.items())
    beside = f" together with {kept}" if held else ""
    said = (
        f"{metric}: {_number(metric, limit)} cannot be reached{beside}: "
        f"the least possible is {_number(metric, least, up=True)}"
    )
    culprits = []
    for name in _set_rules(rules):
        without = _least(items, replace(rules, **{name: getattr(NO_RULES, name)}), metric, held)
        if without is not None and without <= ceiling(metric, limit):
            culprits.append(_name_of(items, rules, name, {**held, metric: limit}))
    if culprits:
        return f"{said}; raise it, or loosen {' or '.join(culprits)}."
    free = _least(items, NO_RULES, metric, held)
    if free is not None and free <= ceiling(metric, limit):
        return f"{said}; raise it, or loosen at least two of {', '.join(_set_rules(rules))}."
    reason = "no pin or rule is to blame"
    if free is not None and free < least:
        reason = f"without any pin or rule it is {_number(metric, free, up=True)}"
    return f"{said}, and {reason}; raise it, or offer smaller options."


def _name_of(items: Sequence[Item], rules: Rules, name: str, limits: Mapping[str, float]) -> str:
    """A rule in words; of the pins, the fewest that make a solution possible when they are loosened."""
    if name != "pins":
        value = getattr(rules, name)
        return name if value is True else f"{name} ({', '.join(f'{key}: {count}' for key, count in value.items())})"
    model = Model(items, replace(rules, pins={}))
    pinned = [rules.pins.get(item.name) for item in items]
    outside = [
        float(allowed is not None and option.name not in allowed)
        for allowed, option in (
            (pinned[item], option) for item, option in zip(model.item_of, model.options, strict=True)
        )
    ]
    names = list(rules.pins)
    chosen = _solve(model, np.array(outside), limits)
    if chosen is not None:
        names = [
            item.name
            for item, allowed, option in zip(items, pinned, chosen, strict=True)
            if allowed is not None and option.name not in allowed
        ]
    shown = ", ".join(f"`{item}` ({', '.join(rules.pins[item])})" for item in names[:NAMES_SHOWN])
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"the pin{'s' if len(names) > 1 else ''} on {shown}{more}"


def _least(items: Sequence[Item], rules: Rules, metric: str, limits: Mapping[str, float]) -> float | None:
    """The least a budget's quantity can be under rules and other budgets; None when these have no solution."""
    model = Model(items, rules)
    chosen = _solve(model, model.values(metric), limits)
    return None if chosen is None else total(items, chosen, metric)


def _is_possible(items: Sequence[Item], rules: Rules) -> bool:
    return _least(items, rules, "stored_bytes", {}) is not None


def _solve(model: Model, objective: Floats, limits: Mapping[str, float]) -> list[Option] | None:
    program, _, _ = model.program(objective, limits)
    try:
        solution = minimise(program, 0.0, SECONDS_PER_QUESTION)
    except OutOfTimeError:
        return None
    return None if solution is None else model.chosen(solution.values)


def _set_rules(rules: Rules) -> list[str]:
    return [rule.name for rule in fields(rules) if getattr(rules, rule.name)]


def _number(metric: str, value: float, *, up: bool = False) -> str:
    """A budget as a person writes it; rounded up where it tells what to ask for."""
    if metric == "stored_bytes":
        return str(int(value))
    if not up or value == 0:
        return f"{value:.6g}"
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / step - 1e-6) * step:.4g}"
