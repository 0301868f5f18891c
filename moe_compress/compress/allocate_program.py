"""Minimise a linear cost over 0/1 columns under linear rows: PuLP models it, HiGHS (or CBC) solves it.

The relaxation is solved first, over all columns. The integer search then works on the columns whose reduced cost is
small (the core of Balas and Zemel, 1980): leaving the others out costs at least the least reduced cost among them,
which either proves the core's solution optimal or says how many columns more it needs. Nothing here knows experts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

LESS, EQUAL, GREATER = pulp.LpConstraintLE, pulp.LpConstraintEQ, pulp.LpConstraintGE
CORE_COLUMNS = 1000
TOLERANCE = 1e-9  # of feasibility: bytes must not slip through it
ROUNDING = 1e-7  # of a reduced cost or an objective, in units of a typical column's cost


@dataclass
class Program:
    """min cost @ x + offset under rows of triplets with a sense and a right-hand side; columns are 0/1 or counts."""

    cost: Floats
    offset: float
    row_of: Ints
    column_of: Ints
    coefficient: Floats
    sense: Ints
    rhs: Floats
    is_count: NDArray[np.bool_]  # whole numbers without an upper bound

    @property
    def num_columns(self) -> int:
        return len(self.cost)


@dataclass
class Relaxation:
    """Optimum of the linear relaxation: objective without the offset, values and reduced costs, prices of the rows."""

    objective: float
    values: Floats
    reduced: Floats
    prices: Floats


@dataclass
class Solution:
    """The best integer point found: `bound` is proven to be at most the optimum; both objectives without the offset."""

    values: Floats
    objective: float
    bound: float
    relaxation: Relaxation


class OutOfTimeError(Exception):
    """The integer search ended without any point."""


@dataclass
class _Outcome:
    """What a solver said of a program, or of the part of it that was left free."""

    values: Floats
    bound: float
    reduced: Floats
    prices: Floats


def minimise(program: Program, gap: float, time_limit: float, solver: str | None = None) -> Solution | None:
    """Minimise to a relative gap (offset counted); None when no point satisfies the rows.

    `time_limit` is in seconds, for the integer search alone. `solver` is "HiGHS" or "CBC". Raises `OutOfTimeError`.
    """
    solver = solver or available_solver()
    nothing = np.full(program.num_columns, np.nan)
    outcome = _run(program, nothing, solver, integer=False)
    if outcome is None:
        return None
    objective = float(program.cost @ outcome.values)
    relaxation = Relaxation(objective, outcome.values, outcome.reduced, outcome.prices)
    deadline = time.monotonic() + time_limit
    allowed = max(0.0, gap * (objective + program.offset))
    reach = _core_reach(relaxation)
    best: Solution | None = None
    while True:
        fixed = _outside(program, relaxation, reach)
        is_whole = bool(np.isnan(fixed).all())
        seconds = deadline - time.monotonic()
        try:
            found = _run(program, fixed, solver, integer=True, allowed=allowed, seconds=max(seconds, 0.1))
        except OutOfTimeError:
            if best is None:
                raise
            return best
        if found is None and is_whole:
            return None
        if found is not None:
            value = float(program.cost @ found.values)
            bound = found.bound if is_whole else min(found.bound, objective + reach)
            if best is None or value < best.objective:
                best = Solution(found.values, value, bound, relaxation)
            best.bound = max(best.bound, objective, min(bound, best.objective))
            if best.objective - best.bound <= allowed + ROUNDING or is_whole or seconds <= 0:
                return best
        wider = 10 * max(reach, ROUNDING) if best is None else (best.objective - objective) * (1 + 1e-6) + ROUNDING
        reach = max(wider, reach * 1.5)


def available_solver() -> str:
    """HiGHS, or CBC where highspy cannot be imported."""
    return "HiGHS" if pulp.HiGHS().available() else "CBC"


def _core_reach(relaxation: Relaxation) -> float:
    """Reduced cost up to which a column belongs to the first core."""
    # The basic columns have none, and most of them are alone in their row: they do not count.
    sizes = np.abs(relaxation.reduced)
    sizes = sizes[sizes > ROUNDING]
    if len(sizes) <= CORE_COLUMNS:
        return float("inf")
    return float(np.partition(sizes, CORE_COLUMNS)[CORE_COLUMNS])


def _outside(program: Program, relaxation: Relaxation, reach: float) -> Floats:
    """Values of the columns outside the core, and of those that they decide; NaN where a column is free."""
    at = np.round(relaxation.values)
    outside = (np.abs(relaxation.reduced) > reach) & ~program.is_count & (np.abs(at - relaxation.values) < ROUNDING)
    fixed = np.where(outside, at, np.nan)
    while True:
        free, rhs, count = _remainder(program, fixed)
        single = free & ((program.sense == EQUAL) & (count == 1))[program.row_of]
        if not single.any() or not outside.any():
            return fixed
        fixed[program.column_of[single]] = rhs[program.row_of[single]] / program.coefficient[single]


def _remainder(program: Program, fixed: Floats) -> tuple[NDArray[np.bool_], Floats, Ints]:
    """Which entries are of free columns; of every row, its right-hand side less the fixed ones, and its free count."""
    free = np.isnan(fixed[program.column_of])
    used = np.where(free, 0.0, program.coefficient * fixed[program.column_of])
    size = len(program.rhs)
    rhs = program.rhs - np.bincount(program.row_of, used, size)
    return free, rhs, np.bincount(program.row_of[free], minlength=size)


def _run(
    program: Program, fixed: Floats, solver: str, *, integer: bool, allowed: float = 0.0, seconds: float | None = None
) -> _Outcome | None:
    """Solve over the columns that are not fixed; None when that is infeasible. Raises `OutOfTimeError`."""
    free, rhs, count = _remainder(program, fixed)
    slack = np.where(program.sense == LESS, rhs, np.where(program.sense == GREATER, -rhs, -np.abs(rhs)))
    if np.any((count == 0) & (slack < -TOLERANCE)):
        return None
    outside = ~np.isnan(fixed)
    if not outside.all():
        model, variables, rows = _model(program, outside, free, rhs, count)
        outcome = _solve(model, solver, integer, allowed, seconds)
        if outcome is None:
            return None
        inside = np.flatnonzero(~outside)
        prices = np.zeros(len(rhs))
        prices[list(rows)] = [row.pi or 0.0 for row in rows.values()]
        reduced = np.zeros(program.num_columns)
        reduced[inside] = [variable.dj or 0.0 for variable in variables]
        values = np.where(outside, fixed, 0.0)
        found = np.array([variable.varValue for variable in variables], dtype=float)
        values[inside] = np.round(found) if integer else found
        constant = float(program.cost[outside] @ values[outside])
        return _Outcome(values, outcome + constant, reduced, prices)
    return _Outcome(fixed, float(program.cost @ fixed), np.zeros(program.num_columns), np.zeros(len(rhs)))


def _model(
    program: Program, outside: NDArray[np.bool_], free: NDArray[np.bool_], rhs: Floats, count: Ints
) -> tuple[Any, list[Any], dict[int, Any]]:
    """The PuLP problem of the free columns, its variables in order, and its rows by their index."""
    problem = pulp.LpProblem("allocation", pulp.LpMinimize)
    variables: dict[int, Any] = {
        # Names of equal width: PuLP sorts variables by name.
        column: problem.add_variable(f"x{column:07d}", 0, None if program.is_count[column] else 1, pulp.LpInteger)
        for column in np.flatnonzero(~outside).tolist()
    }
    costs = program.cost[~outside].tolist()
    problem.setObjective(pulp.LpAffineExpression(dict(zip(variables.values(), costs, strict=True))))
    order = np.flatnonzero(free)
    order = order[np.argsort(program.row_of[order], kind="stable")]
    columns, coefficients = program.column_of[order].tolist(), program.coefficient[order].tolist()
    ends = np.cumsum(count).tolist()
    senses, sides = program.sense.tolist(), rhs.tolist()
    rows, start = {}, 0
    for row, end in enumerate(ends):
        if end > start:
            terms = {variables[c]: a for c, a in zip(columns[start:end], coefficients[start:end], strict=True)}
            rows[row] = pulp.LpConstraint(pulp.LpAffineExpression(terms), senses[row], f"r{row:07d}", sides[row])
            problem.addConstraint(rows[row])
            start = end
    return problem, list(variables.values()), rows


def _solve(problem: Any, solver: str, integer: bool, allowed: float, seconds: float | None) -> float | None:
    """Run one solver; the proven lower bound, None when infeasible. Raises `OutOfTimeError`."""
    limits = {"mip": integer, "msg": False, "timeLimit": seconds, "gapAbs": allowed if integer else None}
    if solver == "HiGHS":
        tolerances = {"mip_feasibility_tolerance": TOLERANCE, "primal_feasibility_tolerance": TOLERANCE}
        problem.solve(pulp.HiGHS(**limits, gapRel=0.0, **(tolerances if integer else {})))
    else:
        problem.solve(pulp.COIN_CMD(path=pulp.PULP_CBC_CMD.pulp_cbc_path, **limits))
    if problem.status == pulp.LpStatusInfeasible:
        return None
    is_proven = problem.sol_status == pulp.LpSolutionOptimal
    if not is_proven and problem.sol_status != pulp.LpSolutionIntegerFeasible:
        raise OutOfTimeError
    if integer and solver == "HiGHS":
        return float(problem.solverModel.getInfo().mip_dual_bound)
    value = float(pulp.value(problem.objective))
    if is_proven:
        return value - allowed
    # CBC ran out of time, and PuLP does not hand on its bound.
    return float("-inf")
