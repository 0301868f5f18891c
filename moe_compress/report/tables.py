"""The figures of a report as text: the rows that every table shows. A figure that is missing reads `not measured`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_compress.text import (
    format_bytes,
    format_count,
    format_flops,
    format_number,
    format_percent,
    format_rate,
)

MISSING = "not measured"
NOTHING = "-"


@dataclass(frozen=True)
class SummaryRow:
    """One line of the comparison; every field is ready to print."""

    label: str
    baseline: str
    compressed: str
    ratio: str
    recovery: str
    provenance: str


def format_score(value: float) -> str:
    """A task's metric, decimals by size so that a column lines up: `0.8530`, `12.35`, `1,234`."""
    size = abs(value)
    return f"{value:.4f}" if size < 10 else f"{value:.2f}" if size < 1000 else format_number(value)


def format_metric(metric: Mapping[str, Any] | None) -> str:
    """`0.8530 ± 0.0110` of {"value", "stderr"}; `not measured` for None."""
    if metric is None or metric.get("value") is None:
        return MISSING
    value, stderr = float(metric["value"]), metric.get("stderr")
    return format_score(value) if stderr is None else f"{format_score(value)} ± {format_score(stderr)}"


def metric_label(task: str, metric: str, higher_is_better: bool | None) -> str:
    """`arc_easy · acc ↑`: the arrow points to better."""
    arrow = "" if higher_is_better is None else " ↑" if higher_is_better else " ↓"
    return f"{task} · {metric.removesuffix(',none')}{arrow}"


Formatter = Callable[[float], str]
FIGURES: tuple[tuple[tuple[str, ...], str, Formatter], ...] = (
    (("total_params",), "total parameters", format_count),
    (("active_params",), "active parameters per token", format_count),
    (("stored_bytes",), "stored size", format_bytes),
    (("active_bytes_per_token",), "weight bytes read per token", format_bytes),
    (("flops_per_token",), "FLOPs per token", format_flops),
    (("expert_flops_per_token",), "routed expert FLOPs per token", format_flops),
    (("experts_per_token_mean",), "routed experts per token, mean", format_number),
    (("kv_bytes_per_token",), "KV cache per token", format_bytes),
    (("speed", "prefill_tokens_per_s"), "prefill speed", format_rate),
    (("speed", "decode_tokens_per_s"), "decode speed", format_rate),
    (("peak_rss_bytes",), "peak memory (RSS)", format_bytes),
    (("peak_gpu_bytes",), "peak GPU memory", format_bytes),
)
# Rows shown even when nothing has them: their absence is news.
ALWAYS = {"stored_bytes", "speed", "peak_rss_bytes"}


def summary_rows(report: Mapping[str, Any]) -> list[SummaryRow]:
    """The rows of the table baseline / compressed / ratio / recovery: costs first, then every metric of every task."""
    return cost_rows(report) + task_rows(report)


def cost_rows(report: Mapping[str, Any]) -> list[SummaryRow]:
    """One row for every cost that either model has, and for those whose absence is news."""
    rows = []
    for path, label, formatter in FIGURES:
        values = [_get(report[side], path) for side in ("baseline", "compressed")]
        if values == [None, None] and path[0] not in ALWAYS:
            continue
        ratio = NOTHING if None in values else format_percent(_get(report["ratio"], path))
        texts = [MISSING if value is None else formatter(value) for value in values]
        provenance = report["provenance"].get(path[0], NOTHING)
        rows.append(
            SummaryRow(figure_label(path, label, report["compressed"]), texts[0], texts[1], ratio, NOTHING, provenance)
        )
    return rows


def figure_label(path: tuple[str, ...], label: str, figures: Mapping[str, Any]) -> str:
    """A row's label; FLOPs per token depend on how many tokens there are."""
    context = figures.get("context")
    return f"{label}, prompt of {context:,}" if path[0] == "flops_per_token" and context else label


def task_rows(report: Mapping[str, Any]) -> list[SummaryRow]:
    """One row for every metric of every task that either model was evaluated on."""
    rows = []
    sides = [report[side].get("tasks", {}) for side in ("baseline", "compressed")]
    for task in dict.fromkeys([*sides[1], *sides[0]]):
        metrics = [side.get(task, {}) for side in sides]
        for name in dict.fromkeys([*metrics[1], *metrics[0]]):
            values = [metric.get(name) for metric in metrics]
            better = next(value for value in values if value is not None).get("higher_is_better")
            left = report["recovery_by_metric"].get(task, {}).get(name)
            recovery = NOTHING if left is None else format_percent(left["value"], left["stderr"])
            label = metric_label(task, name, better)
            texts = [format_metric(value) for value in values]
            rows.append(SummaryRow(label, texts[0], texts[1], NOTHING, recovery, report["provenance"]["tasks"]))
    return rows


def _get(figures: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = figures
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
