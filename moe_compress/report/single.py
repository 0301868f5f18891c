"""What the page about one result shows, section by section; a section of which nothing is known is None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_compress.calibrate.agreement import AUDIT_FILE
from moe_compress.report.audit import criterion_rows, verdicts
from moe_compress.report.build import decode_ratios, random_name
from moe_compress.report.experts import EXPERTS_FILE, expert_maps, survivors
from moe_compress.report.frontier import SAME, SIZE, WORK, mean_recovery, measure_of_size, points, shared_tasks
from moe_compress.report.heatmap import heat_maps
from moe_compress.report.markdown import CHECKS, limits
from moe_compress.report.plots import change, histogram, paired_bars, plane, recovery_strips
from moe_compress.report.result import Result, flat
from moe_compress.report.tables import cost_rows, task_rows
from moe_compress.text import format_bytes, format_count, format_flops, format_percent, format_rate

Report = Mapping[str, Any]
SIZED_BY = {  # title of the plot, what stands to the right, and what kind of figure that is
    SIZE: ("Size and quality", "stored size", "measured"),
    WORK: ("Work and quality", "FLOPs per token", "derived"),
}
PARTS = (
    ("Stored bytes", "bytes_by_part", format_bytes),
    ("Parameters", "params_by_part", format_count),
    ("FLOPs per token", "flops_by_part", format_flops),
)


def single(result: Result) -> dict[str, Any]:
    """Everything that `single.html` draws."""
    report = result.report
    found = points([report], ["this checkpoint"])
    maps = expert_maps(result.plans, result.experts)
    return {
        "title": title(result),
        "model": result.model,
        "records": records(result),
        "lede": lede(report),
        "failed": [name for name, check in report["checks"].items() if not check["passed"]],
        "tiles": tiles(report),
        "costs": cost_rows(report),
        "tasks": task_rows(report),
        "strips": recovery_strips([report], ["this checkpoint"]),
        "plane": plane(found, measure_of_size([report])),
        "sized_by": SIZED_BY[measure_of_size([report])],
        "num_tasks": len(shared_tasks([report])),
        "steps": steps(result),
        "heat": heat_maps(maps, survivors(result.plans)),
        "by_layer": layer_rows(result),
        "parts": [
            (title, report["provenance"].get(key, ""), bars)
            for title, key, show in PARTS
            if (bars := parts(report, key, show))
        ],
        "calibration": calibration(result),
        "audit": audited(result),
        "checks": check_rows(report),
        "recipe": result.recipe.rstrip(),
        "provenance": provenance(result),
        "evaluated": evaluated_tasks(report),
        "files": result.manifest.get("files") or {},
        "limits": limits(report),
        "figures": all_figures(report),
        "summaries": [
            ((task, metric), drawn) for task, by in report["random_summary"].items() for metric, drawn in by.items()
        ],
        "random": random_name(report),
        "seeds": [draw.get("seed", number) for number, draw in enumerate(report["random"])],
    }


def title(result: Result) -> str:
    """`MODEL, 19.6 % smaller`, or `16.5 % fewer FLOPs`; the model alone where sizes are not known or the same."""
    measure = measure_of_size([result.report])
    ratio = result.report["ratio"].get(measure)
    if ratio is None or abs(ratio - 1) < SAME:
        return result.model
    words = ("smaller", "larger") if measure == SIZE else ("fewer FLOPs", "more FLOPs")
    return f"{result.model}, {abs(1 - ratio) * 100:.1f} % {words[ratio > 1]}"


def records(result: Result) -> list[str]:
    """The files that the page was made of."""
    there = {
        "report.json": True,
        "plan.json": result.plans,
        EXPERTS_FILE: result.experts,
        AUDIT_FILE: result.audit,
        "manifest.json": result.manifest,
        "recipe.yaml": result.recipe,
    }
    return [name for name, content in there.items() if content]


def lede(report: Report) -> list[str]:
    """From what to what, by which steps, and what is left of the quality."""
    sentences = []
    before, after = _pair(report, "stored_bytes")
    work = _pair(report, "flops_per_token")
    by = ", then ".join(step_names(report))
    with_steps = f" with {by}" if by else ""
    if measure_of_size([report]) == WORK:
        sentences.append(f"From {format_flops(work[0])} to {format_flops(work[1])} per token{with_steps}.")
    elif before and after:
        sentences.append(f"From {format_bytes(before)} to {format_bytes(after)}{with_steps}.")
    elif after:
        sentences.append(f"{format_bytes(after)} stored{f', made by {by}' if by else ''}.")
    known = {task: value for task, value in report["recovery"].items() if value is not None}
    if len(known) > 1:
        low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        sentences.append(
            f"Of the original's quality it keeps between {format_percent(known[low])} ({low}) and "
            f"{format_percent(known[high])} ({high}), over {len(known)} tasks."
        )
    elif known:
        ((task, value),) = known.items()
        sentences.append(f"Of the original's quality on {task} it keeps {format_percent(value)}.")
    else:
        sentences.append("Quality was not compared with the original's.")
    return sentences


def step_names(report: Report) -> list[str]:
    """`prune (reap)` for every step."""
    settings = report["settings"]
    labels = settings.get("criterion") or []
    labels = labels if isinstance(labels, list) else [labels]
    names = []
    for number, step in enumerate(settings.get("steps") or ()):
        label = labels[number] if number < len(labels) else None
        names.append(f"{step.get('op')} ({label})" if isinstance(label, str) else str(step.get("op")))
    return names


def tiles(report: Report) -> list[dict[str, Any]]:
    """The figures for the first ten seconds: {"label", "value", "detail" lines, "kind", "bad"}."""
    found = []
    size = _pair(report, "stored_bytes")
    if None not in size:
        found.append(_tile("Stored size", change(*size), [_arrow(size, format_bytes)], "measured"))
    tasks = shared_tasks([report])
    if tasks:
        mean, _ = mean_recovery(report, tasks)
        worst = min(tasks, key=report["recovery"].__getitem__)
        left = report["recovery_by_metric"][worst][report["recovery_metric"][worst]]
        lines = [f"mean of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0]]
        lines += [f"worst: {format_percent(left['value'], left['stderr'])}, {worst}"] if len(tasks) > 1 else []
        found.append(_tile("Quality kept", format_percent(mean), lines, "derived"))
    speed = _pair(report, "speed", "decode_tokens_per_s")
    if None not in speed:
        lines = [_arrow(speed, format_rate)]
        seen = decode_ratios(report)
        lines += [f"turn by turn {change(1, seen[0])} to {change(1, seen[1])}"] if seen else []
        found.append(_tile("Decode speed", change(*speed), lines, "measured"))
    flops, read = _pair(report, "flops_per_token"), _pair(report, "active_bytes_per_token")
    if None not in flops:
        lines = [_arrow(flops, format_flops)]
        lines += [] if None in read else [f"weights read: {change(*read)}"]
        found.append(_tile("FLOPs per token", change(*flops), lines, "derived"))
    wins = [drawn["beats_mean"] for by in report["random_summary"].values() for drawn in by.values()]
    judged = [win for win in wins if win is not None]
    if judged:
        seeds = max(drawn["count"] for by in report["random_summary"].values() for drawn in by.values())
        lines = [f"metrics better than the mean of {seeds} {random_name(report, seeds)}"]
        found.append(_tile("Against chance", f"{sum(judged)} of {len(judged)}", lines, "measured", not any(judged)))
    if report["checks"]:
        passed = sum(check["passed"] for check in report["checks"].values())
        lines = ["checks passed"]
        whole = passed == len(report["checks"])
        found.append(_tile("Verified", f"{passed} of {len(report['checks'])}", lines, "measured", not whole))
    return found


def _tile(label: str, value: str, lines: list[str], kind: str, bad: bool = False) -> dict[str, Any]:
    return {"label": label, "value": value, "lines": lines, "kind": kind, "bad": bad}


def _pair(report: Report, *path: str) -> tuple[Any, Any]:
    values: list[Any] = [report["baseline"], report["compressed"]]
    for key in path:
        values = [value.get(key) if isinstance(value, Mapping) else None for value in values]
    return values[0], values[1]


def _arrow(pair: tuple[Any, Any], show: Any) -> str:
    return f"{show(pair[0])} → {show(pair[1])}"


def steps(result: Result) -> list[dict[str, Any]]:
    """What each step is called, what its plan says in sentences, and its settings."""
    names, configs = step_names(result.report), result.report["settings"].get("steps") or []
    found = []
    for number, (name, config) in enumerate(zip(names, configs, strict=True)):
        plan = result.plans[number] if number < len(result.plans) else {}
        found.append({"name": name, "sentences": plan.get("summary", []), "settings": config})
    return found


def layer_rows(result: Result) -> list[dict[str, Any]]:
    """Layer by layer: experts before and after, fewest and most calibration tokens in the first step."""
    alive = survivors(result.plans)
    before = {e["layer"]: e["num_experts"] for plan in reversed(result.plans) for e in plan.get("layers", ())}
    first = next(iter(result.experts), None) or {}
    tokens = {entry["layer"]: entry["statistics"]["tokens"] for entry in first.get("layers", ())}
    return [
        {"layer": layer, "before": before[layer], "after": len(alive[layer]), "tokens": tokens.get(layer)}
        for layer in sorted(alive)
    ]


def parts(report: Report, key: str, show: Any) -> Any:
    """Bars of a cost by part; None where either model's is not known."""
    before, after = (report[side].get(key) for side in ("baseline", "compressed"))
    return paired_bars(before, after, show) if before and after else None


def calibration(result: Result) -> dict[str, Any] | None:
    """Coverage and data of the calibration; None when there was none."""
    found = dict(result.report["settings"].get("calibration") or {})
    if not found:
        return None
    recipe = (result.manifest.get("recipe") or {}).get("calibration") or {}
    if found.get("source") == result.manifest.get("source"):
        found.pop("source", None)  # `provenance` has it
    if "tokens" in found:
        found["fingerprint of the tokens"] = found.pop("tokens")
    data = [entry for entry in found.pop("data", []) if isinstance(entry, Mapping)]
    first = next(iter(result.experts), None) or {}
    tokens = [count for entry in first.get("layers", ()) for count in entry["statistics"]["tokens"]]
    minimum = recipe.get("min_tokens_per_expert")
    return {
        "starved": [f"layer {layer}, expert {expert}" for layer, expert in found.pop("starved", ())],
        "data": data,
        "columns": list(dict.fromkeys(key for entry in data for key in entry)),
        "histogram": histogram(tokens, minimum),
        "minimum": minimum,
        "rest": found,
    }


def audited(result: Result) -> dict[str, Any] | None:
    """What the audit of the scores said about the criteria; None where they were not audited."""
    if not result.audit:
        return None
    rows = criterion_rows(result.audit)
    return {
        "experts": sum(len(layer["experts"]) for layer in result.audit["layers"]),
        "layers": len(result.audit["layers"]),
        "sequences": result.audit["settings"]["sequences"],
        "held_out": "held_out" in result.audit["settings"],
        "sentences": verdicts(result.audit),
        "header": rows[0],
        "rows": rows[1:],
    }


def check_rows(report: Report) -> list[dict[str, Any]]:
    """The five checks, then any others; one that was not run has no outcome. Empty when none was."""
    checks = report["checks"]
    names = dict.fromkeys([*CHECKS, *checks]) if checks else {}
    return [{"name": name, "outcome": checks.get(name)} for name in names]


def provenance(result: Result) -> dict[str, Any]:
    """Where the checkpoint is from, and with what it was made and measured."""
    settings, manifest = result.report["settings"], result.manifest
    source = dict(manifest.get("source") or {})
    if manifest.get("tool"):
        source["made with"] = manifest["tool"]
    evaluation = settings.get("eval") or {}
    known = {
        "source": source,
        "versions": settings.get("versions"),
        "hardware": settings.get("hardware"),
        "evaluation": {name: value for name, value in evaluation.items() if not isinstance(value, Mapping)},
        "speed": result.report["compressed"].get("speed_settings"),
    }
    return {name: content for name, content in known.items() if content}


def evaluated_tasks(report: Report) -> dict[str, Any] | None:
    """The settings of the evaluation that each task has its own of, as a table; None when there are none."""
    evaluation = report["settings"].get("eval") or {}
    own = {name: value for name, value in evaluation.items() if isinstance(value, Mapping) and value}
    tasks = dict.fromkeys(task for values in own.values() for task in values)
    rows = [{"task": task, "cells": [values.get(task) for values in own.values()]} for task in tasks]
    return {"columns": list(own), "rows": rows} if rows else None


def all_figures(report: Report) -> list[dict[str, Any]]:
    """Every number of both models, of their ratio and recovery, and of the random baselines, under its path."""
    sides = [flat(report[side]) for side in ("baseline", "compressed")]
    ratio = flat(report["ratio"])
    left = {("tasks", *path): value for path, value in flat(report["recovery_by_metric"]).items()}
    draws = [flat(draw) for draw in report["random"]]
    rows = []
    for path in dict.fromkeys(path for values in (*sides, *draws) for path in values):
        values = [side.get(path) for side in sides] + [ratio.get(path, left.get(path))]
        values += [draw.get(path) for draw in draws]
        if path != ("seed",) and any(is_figure(value) for value in values):
            kind = report["provenance"].get(path[0], "a setting")
            rows.append({"path": path, "kind": kind, "cells": values})
    return rows


def is_figure(value: Any) -> bool:
    """Whether a value of a report is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
