"""Plots as positions: what stands where, in per cent of the plot's width or height. Geometry only; the template draws.

Positions in per cent, not in units of a drawing, let one plot be as wide as a desk or as a phone while its text keeps
its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from moe_compress.report.build import random_name
from moe_compress.report.frontier import SIZE, Point, dominating, random_recoveries, staircase, ticks
from moe_compress.report.tables import metric_label
from moe_compress.text import format_bytes, format_flops, format_percent

BINS = 16
TICK_DIGITS = 5  # enough for any round number on an axis
ROOM = 5.5  # per cent of a strip that a lettered dot takes, on a phone
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with the positions and texts of its ticks."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """Position of a value in per cent."""
        return round(100 * (value - self.low) / (self.high - self.low), 3)


def axis(values: Sequence[float], show: Callable[[float], str], count: int = 5) -> Axis:
    """An axis of round numbers around these values."""
    low, high = min(values), max(values)
    marks = ticks(low, high, count)
    if len(marks) == 1:
        marks = [marks[0], marks[0] + (abs(marks[0]) or 1.0)]
    first, last = marks[0], marks[-1]
    positions = tuple((round(100 * (mark - first) / (last - first), 3), show(mark)) for mark in marks)
    return Axis(first, last, positions)


def tight_axis(values: Sequence[float], show: Callable[[float], str]) -> Axis:
    """An axis that ends just beyond these values, with the round numbers between."""
    low, high = min(values), max(values)
    room = 0.03 * ((high - low) or abs(high) or 1.0)
    scale = Axis(low - room, high + room, ())
    inside = [mark for mark in ticks(low, high) if scale.low <= mark <= scale.high]
    return Axis(scale.low, scale.high, tuple((scale.at(mark), show(mark)) for mark in inside))


@dataclass(frozen=True)
class Dot:
    """A value on a strip, `text` for the reader; `low` and `high` are one standard error away, equal where unknown."""

    kind: str
    at: float
    text: str
    letter: str = ""
    low: float = 0.0
    high: float = 0.0
    lane: int = 0


@dataclass(frozen=True)
class Strip:
    """One task: its dots, random baselines first; dots that would hide each other lie in `lanes` below each other."""

    label: str
    dots: tuple[Dot, ...]
    verdict: str = ""
    lanes: int = 1


def letter(number: int) -> str:
    """A, B, ... Z, A2, B2, ...: what a result is called in plots."""
    lap, place = divmod(number, len(LETTERS))
    return LETTERS[place] + (str(lap + 1) if lap else "")


def recovery_strips(
    reports: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[Axis, tuple[Strip, ...], float] | None:
    """Recovery by task, beside that of random baselines, an axis for all, and where 100 % is; None without tasks."""
    tasks = list(dict.fromkeys(task for report in reports for task in report["recovery"]))
    table: dict[str, list[tuple[str, int, float, float | None]]] = {}
    for task in tasks:
        for owner, report in enumerate(reports):
            if report["recovery"].get(task) is None:
                continue
            found = report["recovery_by_metric"][task][report["recovery_metric"][task]]
            rows = table.setdefault(task, [])
            rows += [("random", owner, value, None) for value in random_recoveries(report, task)]
            rows.append(("result", owner, found["value"], found["stderr"]))
    if not table:
        return None
    edges = [
        value + sign * (error or 0.0) for rows in table.values() for _, _, value, error in rows for sign in (-1, 1)
    ]
    scale = tight_axis([*edges, 1.0], _share)
    strips = []
    for task, rows in table.items():
        dots = sorted((_dot(row, scale, names, reports) for row in rows), key=lambda dot: dot.kind == "result")
        report = next(report for report in reports if report["recovery"].get(task) is not None)
        name = report["recovery_metric"][task]
        better = report["compressed"]["tasks"][task][name].get("higher_is_better")
        verdict = against_chance(report, task, name) if len(reports) == 1 else ""
        placed = in_lanes(dots) if len(reports) > 1 else dots
        lanes = 1 + max(dot.lane for dot in placed)
        strips.append(Strip(metric_label(task, name, better), tuple(placed), verdict, lanes))
    return scale, tuple(strips), scale.at(1.0)


def _share(value: float) -> str:
    return f"{100 * value:g} %"


def in_lanes(dots: Sequence[Dot]) -> list[Dot]:
    """The same dots, random baselines in a lane of their own, the others each in the first where there is room."""
    placed = [dot for dot in dots if dot.kind == "random"]
    first = 1 if placed else 0
    ends: list[float] = []
    for dot in sorted((dot for dot in dots if dot.kind != "random"), key=lambda dot: dot.at):
        lane = next((lane for lane, end in enumerate(ends) if dot.at - end >= ROOM), len(ends))
        ends[lane : lane + 1] = [dot.at]
        placed.append(replace(dot, lane=first + lane))
    return placed


def _dot(
    row: tuple[str, int, float, float | None], scale: Axis, names: Sequence[str], reports: Sequence[Mapping[str, Any]]
) -> Dot:
    kind, owner, value, error = row
    what = random_name(reports[owner]) if kind == "random" else names[owner]
    if kind == "random" and len(names) > 1:
        what += f" beside {names[owner]}"
    low, high = (scale.at(value + sign * (error or 0.0)) for sign in (-1, 1))
    text = f"{what}: {format_percent(value, error)}"
    return Dot(kind, scale.at(value), text, letter(owner) if len(names) > 1 else "", low, high)


def against_chance(report: Mapping[str, Any], task: str, metric: str) -> str:
    """How a metric compares with random baselines, in a few words; empty where there are none."""
    drawn = report["random_summary"].get(task, {}).get(metric)
    if drawn is None or drawn["beats_mean"] is None:
        return ""
    seeds = f"{drawn['count']} seed{'s' if drawn['count'] > 1 else ''}"
    if drawn["beats_best"]:
        return f"better than {'all ' if drawn['count'] > 1 else ''}{seeds}"
    return f"better than the mean of {seeds}, not than the best" if drawn["beats_mean"] else f"no better than {seeds}"


@dataclass(frozen=True)
class Mark:
    """A point of the frontier."""

    kind: str
    x: float
    y: float
    text: str
    letter: str = ""
    dominated: bool = False
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Plane:
    """Size to the right, quality up (`y` counts from above). `steps` are the frontier's lines (x1, y1, x2, y2)."""

    across: Axis
    up: Axis
    marks: tuple[Mark, ...]
    steps: tuple[tuple[float, float, float, float], ...]


def plane(found: Sequence[Point], measure: str = SIZE, *, relative: bool = False) -> Plane | None:
    """The frontier of these points as a drawing; None when there are none."""
    if not found:
        return None
    in_units = format_bytes if measure == SIZE else format_flops
    show = _share if relative else in_units
    across = axis([point.size for point in found], _share if relative else lambda mark: in_units(mark, TICK_DIGITS))
    edges = [point.quality + sign * (point.stderr or 0.0) for point in found for sign in (-1, 1)]
    up = axis(edges, _share)
    several = sum(point.kind == "result" for point in found) > 1
    order = {"random": 0, "baseline": 1, "result": 2}
    marks = []
    for point in sorted(found, key=lambda point: order[point.kind]):
        above = dominating(point, found)
        text = f"{point.label}: {show(point.size)}, {format_percent(point.quality, point.stderr)}"
        if above is not None and point.kind == "result":
            text += f"; dominated by {above.label}"
        low, high = (100 - up.at(point.quality + sign * (point.stderr or 0.0)) for sign in (-1, 1))
        called = letter(point.owner) if several and point.kind == "result" else ""
        place = across.at(point.size), 100 - up.at(point.quality)
        marks.append(Mark(point.kind, *place, text, called, above is not None, low, high))
    front = [(across.at(point.size), 100 - up.at(point.quality)) for point in staircase(found)]
    steps = []
    for (x1, y1), (x2, y2) in pairwise(front):
        steps += [(x1, y1, x2, y1), (x2, y1, x2, y2)]
    return Plane(across, up, tuple(marks), tuple(steps))


@dataclass(frozen=True)
class Bar:
    """One part before and after, lengths in per cent of the longest."""

    label: str
    before: str
    after: str
    change: str
    lengths: tuple[float, float]


def paired_bars(
    before: Mapping[str, float], after: Mapping[str, float], show: Callable[[float], str]
) -> tuple[Bar, ...]:
    """A pair of bars for each part that either has, the largest first."""
    parts = [part for part in dict.fromkeys([*before, *after]) if before.get(part) or after.get(part)]
    largest = max((value for values in (before, after) for value in values.values()), default=0.0)
    bars = []
    for part in sorted(parts, key=lambda part: -before.get(part, 0.0)):
        pair = before.get(part, 0.0), after.get(part, 0.0)
        lengths = round(100 * pair[0] / largest, 2), round(100 * pair[1] / largest, 2)
        bars.append(Bar(part.replace("_", " "), show(pair[0]), show(pair[1]), change(*pair), lengths))
    return tuple(bars)


def change(before: float | None, after: float | None) -> str:
    """The change in per cent with its sign, `unchanged`, or nothing where one is missing or the first is 0."""
    if not before or after is None:
        return ""
    share = after / before - 1
    if abs(share) < 0.0005:
        return "unchanged"
    return f"{'+' if share > 0 else '−'}{abs(share) * 100:.1f} %"  # noqa: RUF001


@dataclass(frozen=True)
class Histogram:
    """How many experts saw how many tokens: bars (x, width, height, text), and where the minimum is if it is near."""

    across: Axis
    bars: tuple[tuple[float, float, float, str], ...]
    most: int
    minimum: float | None


def histogram(tokens: Sequence[int], minimum: int | None) -> Histogram | None:
    """Experts by the calibration tokens that were routed to them; None without any."""
    if not tokens:
        return None
    edges = ticks(min(tokens), max(tokens), BINS)
    if len(edges) == 1:
        edges = [edges[0], edges[0] + 1]
    counts = [0] * (len(edges) - 1)
    for count in tokens:
        place = next((place for place, edge in enumerate(edges[1:]) if count < edge), len(counts) - 1)
        counts[place] += 1
    scale = Axis(edges[0], edges[-1], ())
    labelled = [mark for mark in ticks(edges[0], edges[-1], 4) if edges[0] <= mark <= edges[-1]]
    scale = Axis(edges[0], edges[-1], tuple((scale.at(mark), f"{mark:,.0f}") for mark in labelled))
    bars = tuple(
        (
            scale.at(low),
            scale.at(high) - scale.at(low),
            100 * count / max(counts),
            f"{count} expert{'s' if count != 1 else ''} with {low:,.0f} to {high:,.0f} tokens",
        )
        for (low, high), count in zip(pairwise(edges), counts, strict=True)
        if count
    )
    near = minimum is not None and scale.low <= minimum <= scale.high
    return Histogram(scale, bars, max(counts), scale.at(float(minimum or 0)) if near else None)
