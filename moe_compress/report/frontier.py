"""Size against quality: the points of one or more results, and which of them another one dominates. Numbers only.

Quality is the mean recovery over the tasks that all results have, each by its headline metric (see `build`). A point is
dominated when another is at most as large and at least as good, and better in one of the two. Where no result is
smaller than its original, but some do less work, FLOPs per token stand in for the size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from moe_compress.report.build import random_name, recovery

Report = Mapping[str, Any]


SIZE, WORK = "stored_bytes", "flops_per_token"
SAME = 0.0005  # relative difference


@dataclass(frozen=True)
class Point:
    """A model on the frontier: `kind` is "baseline", "result" or "random"; `owner` the number of its result.

    `size` is in bytes, or in FLOPs (`measure_of_size`), unless it is relative to the original.
    """

    kind: str
    owner: int
    label: str
    size: float
    quality: float
    stderr: float | None = None


def shared_tasks(reports: Sequence[Report]) -> list[str]:
    """Tasks that all reports have a recovery of, by the same metric, in the first one's order."""
    return [
        task
        for task in (reports[0]["recovery"] if reports else {})
        if all(report["recovery"].get(task) is not None for report in reports)
        and len({report["recovery_metric"][task] for report in reports}) == 1
    ]


def mean_recovery(report: Report, tasks: Sequence[str]) -> tuple[float, float | None]:
    """Mean recovery over `tasks` and its standard error, None where one of them is not known."""
    metrics = [report["recovery_by_metric"][task][report["recovery_metric"][task]] for task in tasks]
    errors = [metric["stderr"] for metric in metrics]
    known = [error for error in errors if error is not None]
    stderr = math.hypot(*known) / len(errors) if len(known) == len(errors) else None
    return fmean(metric["value"] for metric in metrics), stderr


def random_recoveries(report: Report, task: str) -> list[float]:
    """Recovery of each random baseline on a task, by its headline metric, as far as it is known."""
    name = report["recovery_metric"][task]
    baseline = report["baseline"]["tasks"][task][name]
    drawn = [draw.get("tasks", {}).get(task, {}).get(name) for draw in report["random"]]
    values = [recovery(baseline, metric)["value"] for metric in drawn if metric is not None]
    return [value for value in values if value is not None]


def measure_of_size(reports: Sequence[Report]) -> str:
    """What the results are compared by: `SIZE`, or `WORK` where none is smaller than its original, but some do less."""

    def is_less(key: str) -> bool:
        return any((report["ratio"].get(key) or 1) < 1 - SAME for report in reports)

    known = all(report[side].get(WORK) for report in reports for side in ("baseline", "compressed"))
    return WORK if known and is_less(WORK) and not is_less(SIZE) else SIZE


def points(reports: Sequence[Report], names: Sequence[str], *, relative: bool = False) -> list[Point]:
    """All points, results first; sizes as `measure_of_size` has them, or `relative` to each one's baseline.

    Nothing when the results share no task, or sizes are not known.
    """
    tasks, key = shared_tasks(reports), measure_of_size(reports)
    sizes = [[report[side].get(key) for side in ("baseline", "compressed")] for report in reports]
    if not tasks or any(not size for pair in sizes for size in pair):
        return []
    units = [pair[0] if relative else 1 for pair in sizes]
    found, originals, randoms = [], dict[float, Point](), []
    for owner, (report, name, (before, after), unit) in enumerate(zip(reports, names, sizes, units, strict=True)):
        quality, stderr = mean_recovery(report, tasks)
        found.append(Point("result", owner, name, after / unit, quality, stderr))
        originals.setdefault(before / unit, Point("baseline", owner, "original", before / unit, 1.0))
        by_task = [random_recoveries(report, task) for task in tasks]
        for number, draw in enumerate(report["random"]):
            if all(len(values) == len(report["random"]) for values in by_task):
                size = draw.get(key, after) / unit
                label = f"{random_name(report)}, seed {draw.get('seed', number)}"
                label += f", beside {name}" if len(reports) > 1 else ""
                randoms.append(Point("random", owner, label, size, fmean(values[number] for values in by_task)))
    return [*found, *originals.values(), *randoms]


def dominating(point: Point, others: Sequence[Point]) -> Point | None:
    """The best of the points that dominate `point`, None when it stands on the frontier."""
    better = [
        other
        for other in others
        if other.size <= point.size
        and other.quality >= point.quality
        and (other.size < point.size or other.quality > point.quality)
    ]
    return max(better, key=lambda other: (other.quality, -other.size), default=None)


def staircase(found: Sequence[Point]) -> list[Point]:
    """The points that nothing dominates, by size; of equal ones the first."""
    front = [point for point in found if dominating(point, found) is None]
    by_place = {(point.size, point.quality): point for point in reversed(front)}
    return sorted(by_place.values(), key=lambda point: point.size)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high], about `count` steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * unit for unit in (1, 2, 2.5, 5, 10) if power * unit * count >= span)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]
