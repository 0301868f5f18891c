"""What the page that compares several results shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_compress.report.frontier import Point, dominating, mean_recovery, measure_of_size, points, shared_tasks
from moe_compress.report.plots import change, letter, plane, recovery_strips
from moe_compress.report.result import Result, flat
from moe_compress.report.single import SIZED_BY, check_rows, is_figure, step_names
from moe_compress.report.tables import FIGURES, Formatter, figure_label, format_metric, metric_label
from moe_compress.text import format_percent

NO_COMPARISON = ("versions", "torch", "transformers", "lm_eval", "batch_size", "device")  # of `settings.eval`


def comparison(results: Sequence[Result], names: Sequence[str]) -> dict[str, Any]:
    """Everything that `comparison.html` draws."""
    reports = [result.report for result in results]
    models = list(dict.fromkeys(result.model for result in results))
    sources = {_source(result) for result in results}
    relative = len(sources) > 1
    found = points(reports, names, relative=relative)
    tasks = shared_tasks(reports)
    rows = []
    for number, (result, name) in enumerate(zip(results, names, strict=True)):
        own = next((p for p in found if p.kind == "result" and p.owner == number), None)
        above = dominating(own, found) if own is not None else None
        rows.append({
            "letter": letter(number),
            "name": name,
            "model": result.model,
            "steps": ", then ".join(step_names(result.report)) or "unchanged",
            "quality": format_percent(*mean_recovery(result.report, tasks)) if tasks else None,
            "worst": _worst(result.report, tasks),
            "dominated": above and _called(above),
            "placed": own is not None,
            "passed": [check["passed"] for check in result.report["checks"].values()],
        })  # fmt: skip
    return {
        "title": f"{len(results)} checkpoints of {models[0]}" if len(models) == 1 else f"{len(results)} checkpoints",
        "models": models,
        "relative": relative,
        "rows": rows,
        "tasks": tasks,
        "costs": cost_table(reports),
        "strips": recovery_strips(reports, names),
        "recoveries": recovery_table(reports),
        "plane": plane(found, measure_of_size(reports), relative=relative),
        "sized_by": SIZED_BY[measure_of_size(reports)],
        "differences": differences([result.manifest.get("recipe") or {} for result in results]),
        "unlike": unlike(reports),
        "checks": [check_rows(report) for report in reports],
        "figures": all_figures(reports),
    }


def _called(point: Point) -> str:
    return f"{letter(point.owner)} ({point.label})" if point.kind == "result" else point.label


def _source(result: Result) -> Any:
    """What tells one source model from another; not its fingerprint, which a copy of the files changes."""
    source = result.manifest.get("source") or {}
    return result.model, source.get("revision"), result.report["baseline"].get("stored_bytes")


def _worst(report: Mapping[str, Any], tasks: Sequence[str]) -> str | None:
    if not tasks:
        return None
    worst = min(tasks, key=report["recovery"].__getitem__)
    left = report["recovery_by_metric"][worst][report["recovery_metric"][worst]]
    return f"{format_percent(left['value'], left['stderr'])} ({worst})"


def cost_table(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Costs by row and result: what each is, and how it changed from its own original."""
    rows = []
    for path, label, show in FIGURES:
        cells = [_cost(report, path, show) for report in reports]
        if any(cells):
            kinds = {report["provenance"].get(path[0], "") for report, cell in zip(reports, cells, strict=True) if cell}
            rows.append({
                "label": figure_label(path, label, reports[0]["compressed"]),
                "kind": kinds.pop() if len(kinds) == 1 else "",
                "cells": cells,
            })  # fmt: skip
    return rows


def _cost(report: Mapping[str, Any], path: tuple[str, ...], show: Formatter) -> tuple[str, str] | None:
    before, after = (flat(report[side]).get(path) for side in ("baseline", "compressed"))
    return None if after is None else (show(after), change(before, after))


def recovery_table(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Recovery by task and result, and the metric behind it."""
    rows = []
    for task in dict.fromkeys(task for report in reports for task in report["recovery"]):
        report = next(report for report in reports if task in report["recovery"])
        name = report["recovery_metric"][task]
        better = report["compressed"]["tasks"][task][name].get("higher_is_better")
        cells = [_recovered(other, task) if task in other["recovery"] else None for other in reports]
        rows.append({"label": metric_label(task, name, better), "cells": cells})
    return rows


def _recovered(report: Mapping[str, Any], task: str) -> tuple[str, str]:
    name = report["recovery_metric"][task]
    left = report["recovery_by_metric"][task][name]
    return format_percent(left["value"], left["stderr"]), format_metric(report["compressed"]["tasks"][task][name])


def differences(recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings that are not the same in all recipes."""
    tables = [_settings(recipe) for recipe in recipes]
    rows = []
    for path in dict.fromkeys(path for table in tables for path in table):
        values = [table.get(path) for table in tables]
        if any(value != values[0] for value in values):
            rows.append({"path": path, "cells": values, "known": [path in table for table in tables]})
    return rows


def _settings(content: Any, path: str = "") -> dict[str, Any]:
    """Every setting under its dotted path, lists by position."""
    if isinstance(content, Mapping) or (isinstance(content, list) and any(isinstance(i, Mapping) for i in content)):
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        return {
            inner: value
            for key, item in items
            for inner, value in _settings(item, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: content}


def unlike(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings of the evaluation that differ, so that its figures do not quite compare."""
    tables = [_settings(report["settings"].get("eval") or {}) for report in reports]
    tables = [table for table in tables if len(table) > 1]
    names = dict.fromkeys(path for table in tables for path in table)
    differ = [path for path in names if any(table.get(path) != tables[0].get(path) for table in tables)]
    return list(dict.fromkeys(name for path in differ if (name := path.partition(".")[0]) not in NO_COMPARISON))


def all_figures(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every number of the compressed models, then of their ratios and recoveries, under its path."""
    rows = []
    for part in ("compressed", "ratio", "recovery_by_metric"):
        tables = [flat(report[part]) for report in reports]
        for path in dict.fromkeys(path for table in tables for path in table):
            values = [table.get(path) for table in tables]
            if any(map(is_figure, values)):
                rows.append({"path": (part, *path), "cells": values})
    return rows
