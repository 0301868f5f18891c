"""Which option every part of a model takes: the least predicted loss under budgets and rules. No torch.

A multiple-choice program (each item exactly one option) as in PMQ (arXiv 2410.06270), over the whole model at once and
with removal among the options. Modelled in PuLP, solved by HiGHS, or CBC where highspy is missing. What an option costs
and loses is measured elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from moe_compress.compress.allocate_baselines import by_frequency, random_allocation, uniform_by_layer
from moe_compress.compress.allocate_blame import explain
from moe_compress.compress.allocate_model import Model
from moe_compress.compress.allocate_problem import (
    DROP,
    Allocation,
    Budget,
    Item,
    Option,
    Rules,
    ceiling,
    check,
    total,
)
from moe_compress.compress.allocate_program import OutOfTimeError, available_solver, minimise
from moe_compress.errors import NoAllocationError

__all__ = [
    "DROP",
    "Allocation",
    "Budget",
    "Item",
    "Option",
    "Rules",
    "by_frequency",
    "frontier",
    "random_allocation",
    "solve",
    "uniform_by_layer",
]

NO_RULES = Rules()
MOST_TIGHTENINGS = 5


def solve(
    items: Sequence[Item],
    budget: Budget,
    rules: Rules = NO_RULES,
    *,
    time_limit: float = 60.0,
    gap: float = 1e-6,
) -> Allocation:
    """The allocation of least loss that keeps to the budget and the rules.

    `gap` is the relative distance from the optimum at which the search may stop; `time_limit` is in seconds, for the
    integer search (the linear relaxation comes before it). When time runs out first, the best allocation so far is
    returned with the gap that is proven. Raises `UsageError` for wrong names or numbers, `NoAllocationError` for
    budgets or rules that nothing can keep to (by how much, and which rule or pin is to blame), and when time ran out
    with nothing found.
    """
    check(items, budget, rules)
    return _solve(Model(items, rules), budget, time_limit, gap)


def frontier(
    items: Sequence[Item],
    budgets: Iterable[Budget],
    rules: Rules = NO_RULES,
    *,
    time_limit: float = 60.0,
    gap: float = 1e-6,
) -> list[Allocation]:
    """The best allocation of every budget, in their order; the arguments and errors are those of `solve`."""
    model: Model | None = None
    found = []
    for budget in budgets:
        check(items, budget, rules)
        model = model or Model(items, rules)
        found.append(_solve(model, budget, time_limit, gap))
    return found


def _solve(model: Model, budget: Budget, time_limit: float, gap: float) -> Allocation:
    started = time.perf_counter()
    solver = available_solver()
    limits = budget.limits()
    room, bound, relaxation = dict(limits), 0.0, None
    for _ in range(MOST_TIGHTENINGS):
        program, scale, units = model.program(model.values("loss"), room)
        try:
            solution = minimise(program, gap, time_limit, solver)
        except OutOfTimeError:
            raise NoAllocationError(
                f"no allocation was found within {time_limit:g} s; loosen the budget, or offer fewer options."
            ) from None
        if solution is None:
            raise NoAllocationError(explain(model.items, budget, model.rules))
        if relaxation is None:
            # The later rounds only ask for less, so what bounds the first one bounds the problem.
            relaxation = solution.relaxation
            bound = (solution.bound + program.offset) * scale
            relaxed = (relaxation.objective + program.offset) * scale
            prices = relaxation.prices[len(relaxation.prices) - len(limits) :]
        chosen = model.chosen(solution.values)
        over = {name: total(model.items, chosen, name) - ceiling(name, limit) for name, limit in limits.items()}
        if all(excess <= 0 for excess in over.values()):
            break
        # The solver's tolerance let a budget slip: ask for as much less.
        room = {name: limit - 2 * max(0.0, over[name]) for name, limit in room.items()}
    else:
        raise AssertionError("the solver keeps overrunning the budget")
    loss = total(model.items, chosen, "loss")
    assert relaxed <= loss + 1e-6 * scale * len(program.cost), "a relaxation cannot cost more"
    proven = min(max(bound, relaxed), loss)
    reached = (loss - proven) / loss if loss > 0 else 0.0
    weights = sum(item.num_weights for item in model.items)
    return Allocation(
        chosen=tuple(option.name for option in chosen),
        loss=loss,
        stored_bytes=int(total(model.items, chosen, "stored_bytes")),
        active_bytes=total(model.items, chosen, "active_bytes"),
        average_bits=total(model.items, chosen, "average_bits"),
        optimal=reached <= max(gap, 1e-9),
        gap=reached,
        relaxation_bound=min(relaxed, loss),
        shadow_prices={
            name: max(0.0, -float(price)) * scale / units[name] * (weights if name == "average_bits" else 1)
            for name, price in zip(limits, prices, strict=True)
        },
        solver=solver,
        seconds=time.perf_counter() - started,
    )
