"""What an allocation is asked and what it answers: items with options, budgets, rules, and the mistakes in them.

Numbers only: no torch, no solver. How the problem is solved is `allocate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches

from moe_compress.errors import UsageError

DROP = "drop"
FLOAT_SLACK = 1e-9  # part of a budget that rounding may add; stored bytes are whole numbers and need none


@dataclass(frozen=True)
class Option:
    """One thing that can be done to an item: a bit-width, `keep` (untouched) or `drop` (removed)."""

    name: str  # unique within an item; "drop" is the removal
    bits: float  # nominal bits per weight: 0 when dropped
    stored_bytes: int  # scales and zero points counted
    active_bytes: float  # expected bytes read per token
    loss: float  # predicted loss, finite and not negative


@dataclass(frozen=True)
class Item:
    """A part of the model that takes exactly one option.

    Items with the same layer and expert are projections of one expert: all of them are dropped, or none is.
    """

    name: str
    layer: int | None
    num_weights: int
    options: tuple[Option, ...]
    expert: int | None = None


@dataclass(frozen=True)
class Budget:
    """Upper limits, all of which hold; None is no limit.

    `average_bits` is sum(bits * num_weights) / sum(num_weights) over all items, the dropped ones counted with 0 bits.
    """

    average_bits: float | None = None
    stored_bytes: int | None = None
    active_bytes: float | None = None

    def limits(self) -> dict[str, float]:
        """The budgets that are set, by name."""
        values = {budget.name: getattr(self, budget.name) for budget in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Rules:
    """What an allocation must keep to, besides its budget."""

    pins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # item name -> options it may take
    pinned_by: str = ""  # the setting that pins are made by, for the reader
    minimum_counts: Mapping[str, int] = field(default_factory=dict)  # option -> items of every layer that offers it
    max_drops_per_layer: Mapping[int, int] = field(default_factory=dict)  # layer -> experts it may lose
    equal_drops: bool = False  # every layer with experts loses the same number of them
    same_option: bool = False  # all items that are not dropped take one option; items without a layer are free
    same_option_per_layer: bool = False  # the same within each layer


@dataclass(frozen=True)
class Allocation:
    """The option of every item, what they cost together, and how good that is proven to be."""

    chosen: tuple[str, ...]  # option names, in the order of the items
    loss: float
    stored_bytes: int
    active_bytes: float
    average_bits: float
    optimal: bool  # proven to be within the gap asked for
    gap: float  # (loss - proven lower bound) / loss
    relaxation_bound: float  # least loss of the linear relaxation, never above `loss`
    shadow_prices: dict[str, float]  # budget -> loss saved per unit more of it, in the relaxation
    solver: str
    seconds: float


def total(items: Sequence[Item], chosen: Sequence[Option], metric: str) -> float:
    """`loss` or a budget's quantity over all items; stored bytes are exact."""
    if metric == "average_bits":
        bits = math.fsum(option.bits * item.num_weights for item, option in zip(items, chosen, strict=True))
        return bits / sum(item.num_weights for item in items)
    values = [getattr(option, metric) for option in chosen]
    return sum(values) if metric == "stored_bytes" else math.fsum(values)


def ceiling(metric: str, limit: float) -> float:
    """The most a total may be under a limit, rounding allowed for."""
    return math.floor(limit) if metric == "stored_bytes" else limit * (1 + FLOAT_SLACK)


def check(items: Sequence[Item], budget: Budget, rules: Rules) -> None:
    """Raise a `UsageError` for the first mistake in the numbers or in the names of a problem."""
    if not items:
        raise UsageError("there is nothing to allocate: give at least one item.")
    by_name = {item.name: item for item in items}
    assert len(by_name) == len(items), "item names are unique"
    offered: set[str] = set()
    for item in items:
        assert item.num_weights > 0 and (item.expert is None or item.layer is not None), item.name
        names = {option.name for option in item.options}
        assert len(names) == len(item.options) > 0, f"{item.name}: options are unique, and there is at least one"
        offered |= names
        for option in item.options:
            for metric in ("loss", "bits", "stored_bytes", "active_bytes"):
                value = getattr(option, metric)
                if not (0 <= value < math.inf):
                    raise UsageError(
                        f"the {metric} of `{item.name}` at `{option.name}` is {value}, but must be a finite number "
                        "that is not negative; score again."
                    )
    _check_budget(budget)
    for name, allowed in rules.pins.items():
        if name not in by_name:
            raise UsageError(f"pins: there is no item `{name}`{_hint(name, by_name)}")
        if not allowed:
            raise UsageError(f"pins: `{name}` is left without any option; name at least one.")
        options = [option.name for option in by_name[name].options]
        for option_name in allowed:
            if option_name not in options:
                raise UsageError(f"pins: `{name}` has no option `{option_name}`; it has {', '.join(options)}.")
    for name, count in rules.minimum_counts.items():
        if name not in offered:
            raise UsageError(f"minimum_counts: no item offers `{name}`; the options are {', '.join(sorted(offered))}.")
        if count < 0:
            raise UsageError(f"minimum_counts: {name}: {count} is negative; give 0 or more.")
    layers = {item.layer for item in items}
    for layer, count in rules.max_drops_per_layer.items():
        if layer not in layers:
            raise UsageError(f"max_drops_per_layer: no item is in layer {layer}.")
        if count < 0:
            raise UsageError(f"max_drops_per_layer: {layer}: {count} is negative; give 0 or more.")


def _check_budget(budget: Budget) -> None:
    limits = budget.limits()
    if not limits:
        raise UsageError("no budget is set; give average_bits, stored_bytes or active_bytes.")
    for name, limit in limits.items():
        if not (0 <= limit < math.inf):
            raise UsageError(f"{name}: {limit} is no budget; give a finite number that is not negative.")


def _hint(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean `{near[0]}`?" if near else "."
