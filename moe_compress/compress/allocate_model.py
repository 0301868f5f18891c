"""Items and rules as a 0/1 program: which columns there are, which rows bind them, and what a solution means.

A column is taken or not and stands for one or more choices (item, option). The projections of an expert share one
column for being dropped. Where all must take the same option, a column per option stands for all the items that cannot
be dropped, and an expert that can be dropped follows it or is dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moe_compress.compress.allocate_problem import DROP, FLOAT_SLACK, Item, Option, Rules, ceiling
from moe_compress.compress.allocate_program import EQUAL, GREATER, LESS, Floats, Program

COST_CEILING = 1e12  # in units of a typical column's cost; solvers take 1e20 for infinite
FINEST_UNIT = 1e-6  # of the largest coefficient: finer steps are not worth whole-numbered rows


class Model:
    """Columns and rows of a problem; `program` adds an objective and budgets to it."""

    def __init__(self, items: Sequence[Item], rules: Rules) -> None:
        self.items = items
        self.rules = rules
        self._num_columns = 0
        self._choices: list[tuple[int, int, int]] = []  # (column, item, index of its option)
        self._rows: list[tuple[list[int], list[float], int, float]] = []
        self._counts: list[int] = []
        self._drops: dict[int, list[int]] = {}  # layer with experts -> columns that drop one
        self._build()
        choices = np.array(self._choices, dtype=np.intp).reshape(-1, 3)
        self.column_of, self.item_of, self.option_of = choices.T
        self.options = [items[item].options[option] for _, item, option in self._choices]
        self.num_weights: Floats = np.array([item.num_weights for item in items], dtype=float)[self.item_of]

    def values(self, metric: str) -> Floats:
        """`loss` or a budget's quantity (weighted bits for `average_bits`) of every choice."""
        if metric == "average_bits":
            bits: Floats = np.array([option.bits for option in self.options], dtype=float)
            return bits * self.num_weights
        return np.array([getattr(option, metric) for option in self.options], dtype=float)

    def program(self, objective: Floats, limits: Mapping[str, float]) -> tuple[Program, float, dict[str, float]]:
        """The program, the loss that a unit of its cost is, and of every budget the quantity that a unit of it is.

        `objective` is per choice. The budgets are the last rows, in the order of `limits`.
        """
        offset, cost = self._above_least(objective)
        positive = cost[cost > 0]
        scale = float(np.median(positive)) if positive.size else 1.0
        rows, units = list(self._rows), {}
        for metric, limit in limits.items():
            least, extra = self._above_least(self.values(metric))
            units[metric], is_whole = _unit(extra)
            room = ceiling(metric, limit) * (sum(item.num_weights for item in self.items) if _is_mean(metric) else 1)
            rhs = (room - least) / units[metric]
            columns = np.flatnonzero(extra)
            # What no whole number can use would only loosen the relaxation, and with it what can be proven.
            rhs = float(np.floor(rhs + FLOAT_SLACK)) if is_whole else rhs
            rows.append((columns.tolist(), (extra[columns] / units[metric]).tolist(), LESS, rhs))
        sizes = [len(columns) for columns, _, _, _ in rows]
        is_count = np.zeros(self._num_columns, dtype=bool)
        is_count[self._counts] = True
        program = Program(
            cost=np.minimum(cost / scale, COST_CEILING),
            offset=offset / scale,
            row_of=np.repeat(np.arange(len(rows)), sizes),
            column_of=np.array([column for columns, _, _, _ in rows for column in columns], dtype=np.intp),
            coefficient=np.array([value for _, values, _, _ in rows for value in values], dtype=float),
            sense=np.array([sense for _, _, sense, _ in rows], dtype=np.intp),
            rhs=np.array([rhs for _, _, _, rhs in rows], dtype=float),
            is_count=is_count,
        )
        return program, scale, units

    def chosen(self, values: Floats) -> list[Option]:
        """The option of every item, from the values of the columns."""
        taken = np.flatnonzero(values[self.column_of] > 0.5)
        assert np.array_equal(np.sort(self.item_of[taken]), np.arange(len(self.items))), "one option each"
        picked = dict(zip(self.item_of[taken].tolist(), self.option_of[taken].tolist(), strict=True))
        return [item.options[picked[index]] for index, item in enumerate(self.items)]

    def _above_least(self, values: Floats) -> tuple[float, Floats]:
        """The sum of every item's least value, and what each column adds to it."""
        least = np.full(len(self.items), np.inf)
        np.minimum.at(least, self.item_of, values)
        least[np.isinf(least)] = 0.0
        extra = values - least[self.item_of]
        return float(least.sum()), np.bincount(self.column_of, extra, self._num_columns).astype(float)

    def _build(self) -> None:
        allowed = [allowed_options(item, self.rules) for item in self.items]
        schemes: dict[int | None, list[tuple[list[int], int | None]]] = defaultdict(list)
        for members in groups(self.items):
            layer = self.items[members[0]].layer
            is_expert = self.items[members[0]].expert is not None
            if is_expert and layer is not None:
                self._drops.setdefault(layer, [])
            drop = None
            if all(DROP in allowed[item] for item in members):
                drop = self._column((item, allowed[item][DROP]) for item in members)
                if is_expert and layer is not None:
                    self._drops[layer].append(drop)
            has_scheme, scheme = scheme_of(self.items[members[0]], self.rules)
            if has_scheme:
                schemes[scheme].append((members, drop))
                continue
            for item in members:
                kept = [index for name, index in allowed[item].items() if name != DROP]
                columns = [self._column([(item, index)]) for index in kept]
                self._exactly_one(columns if drop is None else [*columns, drop])
        for parts in schemes.values():
            self._build_scheme(parts, allowed)
        self._add_counts()

    def _build_scheme(self, parts: list[tuple[list[int], int | None]], allowed: list[dict[str, int]]) -> None:
        """One option for all items of `parts`, each with the column that drops it if there is one."""
        rigid = [item for members, drop in parts if drop is None for item in members]
        loose = [(members, drop) for members, drop in parts if drop is not None]
        names_of_loose = [common_options(allowed, members) for members, _ in loose]
        if rigid:
            names = common_options(allowed, rigid)
        else:
            names = list(dict.fromkeys(name for own in names_of_loose for name in own))
        scheme = {name: self._column((item, allowed[item][name]) for item in rigid) for name in names}
        if rigid or names:
            self._exactly_one(list(scheme.values()))
        for (members, drop), own in zip(loose, names_of_loose, strict=True):
            follow = {
                name: self._column((item, allowed[item][name]) for item in members) for name in own if name in scheme
            }
            for name, column in follow.items():
                self._rows.append(([column, scheme[name]], [1.0, -1.0], LESS, 0.0))
            self._exactly_one([*follow.values(), drop])

    def _add_counts(self) -> None:
        minimum = self.rules.minimum_counts
        taking: dict[tuple[int, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
        offered = {(item.layer, option.name) for item in self.items for option in item.options}
        if minimum:
            for column, item, option in self._choices:
                layer, name = self.items[item].layer, self.items[item].options[option].name
                if layer is not None and name in minimum:
                    taking[layer, name][column] += 1.0
        for layer, name in sorted((layer, name) for layer, name in offered if layer is not None and name in minimum):
            terms = taking[layer, name]
            self._rows.append((list(terms), list(terms.values()), GREATER, float(minimum[name])))
        for layer, most in self.rules.max_drops_per_layer.items():
            columns = self._drops.get(layer, [])
            self._rows.append((columns, [1.0] * len(columns), LESS, float(most)))
        if self.rules.equal_drops and any(self._drops.values()):
            count = self._column([])
            self._counts.append(count)
            for columns in self._drops.values():
                self._rows.append(([*columns, count], [*[1.0] * len(columns), -1.0], EQUAL, 0.0))

    def _column(self, choices: Iterable[tuple[int, int]]) -> int:
        column = self._num_columns
        self._choices += [(column, item, option) for item, option in choices]
        self._num_columns += 1
        return column

    def _exactly_one(self, columns: list[int]) -> None:
        self._rows.append((columns, [1.0] * len(columns), EQUAL, 1.0))


def allowed_options(item: Item, rules: Rules) -> dict[str, int]:
    """The options an item may take: name -> index."""
    pinned = rules.pins.get(item.name)
    return {option.name: i for i, option in enumerate(item.options) if pinned is None or option.name in pinned}


def common_options(allowed: Sequence[Mapping[str, int]], items: Sequence[int]) -> list[str]:
    """Names of the options other than being dropped that all of the items may take, in the first one's order."""
    first, *rest = (allowed[item] for item in items)
    return [name for name in first if name != DROP and all(name in other for other in rest)]


def groups(items: Sequence[Item]) -> list[list[int]]:
    """Items that are dropped together: the projections of each expert, and every other item by itself."""
    found: dict[tuple[int | None, int], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        found[(item.layer, item.expert) if item.expert is not None else (None, index)].append(index)
    return list(found.values())


def scheme_of(item: Item, rules: Rules) -> tuple[bool, int | None]:
    """Whether an item shares its option with others, and with which layer (None: with those of all layers)."""
    if item.layer is None:
        return False, None
    return rules.same_option or rules.same_option_per_layer, None if rules.same_option else item.layer


def _is_mean(metric: str) -> bool:
    return metric == "average_bits"


def _unit(extra: Floats) -> tuple[float, bool]:
    """What to divide a budget's coefficients by: their greatest common divisor if it is not too fine, else the largest.

    Also whether the coefficients are whole then, which keeps them exact.
    """
    largest = float(extra.max(initial=0.0))
    if largest == 0:
        return 1.0, False
    if largest < 2**53 and np.array_equal(extra, np.round(extra)):
        divisor = float(np.gcd.reduce(extra.astype(np.int64)))
        if divisor >= FINEST_UNIT * largest:
            return divisor, True
    return largest, False
