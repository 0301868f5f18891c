"""From the figures of two models to `report.json`: ratios, recoveries, random baselines, where each figure comes from.

Measures nothing itself, and invents nothing: a figure that is missing on either side has no ratio and no recovery.

Model figures M (every key may be missing): `total_params`, `active_params`, `stored_bytes`, `active_bytes_per_token`,
`flops_per_token`, `expert_flops_per_token`, `experts_per_token_mean`, `peak_rss_bytes`, further numbers of the cost
model, `params_by_part`, `bytes_by_part` and `flops_by_part` {part: number}, `speed` {`prefill_tokens_per_s`,
`decode_tokens_per_s`}, `speed_turns` {the same: {turn: rate}} and `tasks` {task: {metric: {`value`, `stderr`,
`higher_is_better`}}}. `context` is the prompt's length that FLOPs hold for, `notes` what the costs leave out, and
`not_measured` {"tasks": why, "speed": why} says what could not be measured.

Settings (every key may be missing): `model`, `revision`, `criterion`, `steps`, `calibration` (the scores' summary and
fingerprint), `eval` (few-shot, batch size, limit, ...), `versions`, `hardware`; anything else is carried along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from moe_compress.recipe import random_word

FORMAT = 1
SETTINGS = frozenset({"not_measured", "context", "speed_settings"})  # no figures, but what those hold for
MEASURED = frozenset(
    {"stored_bytes", "bytes_by_part", "peak_rss_bytes", "peak_gpu_bytes", "speed", "speed_turns", "tasks"}
)
# The metric that stands for a task, the first that it has; lm-eval appends a filter after a comma.
HEADLINE_METRICS = ("exact_match", "pass@1", "acc", "acc_norm", "f1", "bits_per_byte", "byte_perplexity")


def build_report(
    baseline: Mapping[str, Any],
    compressed: Mapping[str, Any],
    random: Sequence[Mapping[str, Any]] = (),
    checks: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `report.json`, free of NaN and infinity (they become null).

    `random` are the M of random baselines, each with its `seed`. `provenance` says of every key of M whether it is
    "measured" (`MEASURED`) or "derived" (all else). `ratio` is compressed / baseline. `recovery` is, per task and for
    its headline metric, compressed / baseline where higher is better and baseline / compressed where lower is; null
    where the divisor is 0 or the direction unknown. Its standard error follows from the two by first-order
    propagation as if the runs were independent; they share their documents, so it is rather too wide.
    """
    baseline, compressed = _finite(baseline), _finite(compressed)
    draws = [_finite(draw) for draw in random]
    by_metric = {
        task: {
            metric: recovery(baseline["tasks"][task][metric], values)
            for metric, values in metrics.items()
            if metric in baseline.get("tasks", {}).get(task, {})
        }
        for task, metrics in compressed.get("tasks", {}).items()
    }
    by_metric = {task: metrics for task, metrics in by_metric.items() if metrics}
    headline = {task: headline_metric(metrics) for task, metrics in by_metric.items()}
    report: dict[str, Any] = {
        "format": FORMAT,
        "baseline": baseline,
        "compressed": compressed,
        "ratio": _ratios(baseline, compressed),
        "recovery": {task: by_metric[task][metric]["value"] for task, metric in headline.items()},
        "recovery_metric": headline,
        "recovery_by_metric": by_metric,
        "random": draws,
        "random_summary": _random_summary(compressed, draws),
        "checks": dict(checks or {}),
        "settings": _finite(settings or {}),
    }
    report["provenance"] = _provenance(report)
    return report


def headline_metric(metrics: Mapping[str, Any]) -> str:
    """The metric that stands for its task: the first of `HEADLINE_METRICS` it has, else its first."""
    for name in HEADLINE_METRICS:
        for metric in metrics:
            if metric.partition(",")[0] == name:
                return metric
    return next(iter(metrics))


def random_name(report: Mapping[str, Any], count: int = 1) -> str:
    """What the random baselines of these steps are called: `random pruning`, `random bit allocations`."""
    word = random_word(report["settings"].get("steps") or ()) or "choice"
    return f"random {word}{'s' if count != 1 else ''}"


def decode_ratios(report: Mapping[str, Any]) -> tuple[float, float] | None:
    """The least and the greatest ratio of two decode speeds of the same turn; None where there are no turns."""
    ratios = report["ratio"].get("speed_turns", {}).get("decode_tokens_per_s", {}).values()
    return (min(ratios), max(ratios)) if ratios else None


def recovery(baseline: Mapping[str, Any], compressed: Mapping[str, Any]) -> dict[str, float | None]:
    """How much of one metric is left, 1 being all of it: {"value", "stderr"}, null where that is undefined."""
    higher_is_better = compressed.get("higher_is_better", baseline.get("higher_is_better"))
    if higher_is_better is None:
        return {"value": None, "stderr": None}
    above, below = (compressed, baseline) if higher_is_better else (baseline, compressed)
    if above["value"] is None or not below["value"]:
        return {"value": None, "stderr": None}
    value = above["value"] / below["value"]
    errors = above.get("stderr"), below.get("stderr")
    if errors[0] is None or errors[1] is None:
        return {"value": value, "stderr": None}
    return {"value": value, "stderr": math.hypot(errors[0], value * errors[1]) / abs(below["value"])}


def _finite(value: Any) -> Any:
    """A JSON-able copy in which NaN and infinity are null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ratios(baseline: Mapping[str, Any], compressed: Mapping[str, Any]) -> dict[str, Any]:
    """compressed / baseline of every number that both have, `tasks` aside; null when the baseline is 0."""
    ratios: dict[str, Any] = {}
    for key, value in compressed.items():
        other = baseline.get(key)
        if key in SETTINGS:
            continue
        if _is_number(value) and _is_number(other):
            ratios[key] = value / other if other else None
        elif key != "tasks" and isinstance(value, dict) and isinstance(other, dict):
            inner = _ratios(other, value)
            if inner:
                ratios[key] = inner
    return ratios


def _random_summary(compressed: Mapping[str, Any], draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per task and metric: the random baselines' mean, spread (standard deviation over seeds), best, and who wins."""
    summary: dict[str, Any] = {}
    for task, metrics in compressed.get("tasks", {}).items():
        for metric, chosen in metrics.items():
            values = [draw.get("tasks", {}).get(task, {}).get(metric, {}).get("value") for draw in draws]
            values = [value for value in values if value is not None]
            if not values:
                continue
            mean, higher, value = fmean(values), chosen.get("higher_is_better"), chosen["value"]
            known = higher is not None and value is not None
            best = None if higher is None else max(values) if higher else min(values)
            summary.setdefault(task, {})[metric] = {
                "count": len(values),
                "mean": mean,
                "spread": stdev(values) if len(values) > 1 else None,
                "best": best,
                "beats_mean": (value > mean if higher else value < mean) if known else None,
                "beats_best": (value > best if higher else value < best) if known else None,
            }
    return summary


def _provenance(report: Mapping[str, Any]) -> dict[str, str]:
    """ "measured" or "derived" for every kind of figure that the report holds."""
    kinds: dict[str, str] = {}
    for figures in (report["baseline"], report["compressed"]):
        for key, value in figures.items():
            if key not in SETTINGS and (_is_number(value) or (isinstance(value, dict) and value)):
                kinds[key] = "measured" if key in MEASURED else "derived"
    computed = ("ratio", "recovery", "recovery_by_metric", "random_summary")
    return (
        kinds
        | {key: "derived" for key in computed if report[key]}
        | ({"random": "measured"} if report["random"] else {})
    )
