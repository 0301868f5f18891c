"""`report.md`: what was done, what it cost, how sure that is, and what it does not show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from moe_compress.recipe import random_word
from moe_compress.report.build import decode_ratios, random_name
from moe_compress.report.tables import format_metric, format_score, metric_label, summary_rows
from moe_compress.text import format_bytes, format_count, format_percent, listed

CHECKS = ("coverage", "bytes", "keys", "logits", "target")
GENERATIVE_METRICS = frozenset({"exact_match", "pass@1", "pass_at_1", "f1", "bleu", "rouge1", "rougeL", "chrf"})
ENOUGH_SEEDS = 3
LISTED = 20  # entries of a list that are written out
LEGEND = (
    "Ratio is compressed / baseline; recovery is compressed / baseline where higher is better (↑), baseline / "
    "compressed where lower is (↓). Both are derived. After ± stands one standard error. 1 GB = 10^9 bytes."
)


def report_markdown(report: Mapping[str, Any], recipe_yaml: str, plans: Sequence[Mapping[str, Any]] = ()) -> str:
    """The whole of `report.md`. `plans` are the steps' plan.json contents, in order; nothing is shown without them."""
    settings = report["settings"]
    sections: list[tuple[str, Iterable[str]]] = [
        ("Result", comparison_table(report)),
        random_section(report),
        ("Steps", [line for index, plan in enumerate(plans) for line in _plan_lines(index, plan)]),
        ("Calibration", _calibration_lines(settings.get("calibration"))),
        ("Verification", check_table(report)),
        ("Measured and derived", _provenance_lines(report)),
        ("Evaluation settings", _settings_lines(settings.get("eval"))),
        ("Versions and hardware", _settings_lines({k: settings[k] for k in ("versions", "hardware") if k in settings})),
        ("Limits", [f"* {limit}" for limit in limits(report)]),
        ("Recipe", ["```yaml", recipe_yaml.rstrip(), "```"] if recipe_yaml.strip() else ["Not recorded."]),
    ]
    lines = [f"# Compression report: {_model(settings)}", "", headline(report)]
    for title, body in sections:
        lines += ["", f"## {title}", "", *(list(body) or ["Not recorded."])]
    return "\n".join(lines) + "\n"


def headline(report: Mapping[str, Any]) -> str:
    """One paragraph: size, parameters, the span of recoveries, and whether verification held."""
    parts = []
    for key, label, formatter in (
        ("stored_bytes", "stored size", format_bytes),
        ("total_params", "total parameters", format_count),
        ("active_params", "active parameters", format_count),
    ):
        parts += _change(report, key, label, formatter)
    sentences = [f"{_model(report['settings'])}: {', '.join(parts) or 'no size was recorded'}."]
    known = {task: value for task, value in report["recovery"].items() if value is not None}
    if len(known) == 1:
        ((task, value),) = known.items()
        sentences.append(f"Recovery is {format_percent(value)} on {task}.")
    elif known:
        low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        sentences.append(
            f"Recovery lies between {format_percent(known[low])} ({low}) and {format_percent(known[high])} ({high}) "
            f"over {len(known)} tasks."
        )
    else:
        sentences.append("Quality was not compared with the original's.")
    failed = [name for name, check in report["checks"].items() if not check["passed"]]
    if failed:
        sentences.append(f"**Verification FAILED: {', '.join(failed)}.**")
    return " ".join(sentences)


def comparison_table(report: Mapping[str, Any]) -> list[str]:
    """The table baseline / compressed / ratio / recovery."""
    rows = [
        (row.label, row.baseline, row.compressed, row.ratio, row.recovery, row.provenance)
        for row in summary_rows(report)
    ]
    return [
        *_table(("", "baseline", "compressed", "ratio", "recovery", "figure is"), rows),
        "",
        LEGEND,
    ]


def random_section(report: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Title and lines of what was chosen beside the same drawn at random."""
    drawable = random_word(report["settings"].get("steps") or ())
    return f"Against {random_name(report) if drawable else 'chance'}", random_lines(report)


def random_lines(report: Mapping[str, Any]) -> list[str]:
    """What was chosen beside random choices of the same size, and a plain sentence for every task metric."""
    summary = report["random_summary"]
    if not summary and random_word(report["settings"].get("steps") or ()) is None:
        return ["These steps have no random counterpart to compare them with."]
    if not summary:
        return [f"No {random_name(report)} was evaluated, so nothing here shows that the choice is better than chance."]
    criterion = _inline(report["settings"].get("criterion", "the criterion"))
    rows, sentences = [], []
    for task, metrics in summary.items():
        for name, draws in metrics.items():
            chosen = report["compressed"]["tasks"][task][name]
            label = metric_label(task, name, chosen.get("higher_is_better"))
            drawn = ["-" if draws[key] is None else format_score(draws[key]) for key in ("mean", "spread", "best")]
            rows.append((label, format_metric(chosen), *drawn, str(draws["count"])))
            others = random_name(report, draws["count"])
            sentences.append(f"* {task}, {name}: {_verdict(criterion, chosen, draws, others)}")
    header = ("", criterion, "random: mean", "spread over seeds", "best seed", "seeds")
    seeds = ", ".join(str(draw["seed"]) for draw in report["random"] if "seed" in draw)
    used = f"Spread is the standard deviation over seeds{f' ({seeds})' if seeds else ''}."
    return [*_table(header, rows), "", used, "", *sentences]


def check_table(report: Mapping[str, Any]) -> list[str]:
    """The five checks; one that is missing says `not run`."""
    checks = report["checks"]
    rows = []
    for name in dict.fromkeys([*CHECKS, *checks]):
        check = checks.get(name)
        outcome = "not run" if check is None else "passed" if check["passed"] else "**FAILED**"
        rows.append((name, outcome, "" if check is None else str(check.get("detail", ""))))
    return _table(("check", "outcome", "detail"), rows)


def limits(report: Mapping[str, Any]) -> list[str]:
    """What a reader must not conclude from this report, one sentence each."""
    found = []
    evaluation = report["settings"].get("eval") or {}
    metrics = {name.partition(",")[0] for task in report["compressed"].get("tasks", {}).values() for name in task}
    found += [
        f"{what.capitalize()} of the {side} model: not measured: {reason}"
        for side in ("baseline", "compressed")
        for what, reason in report[side].get("not_measured", {}).items()
    ]
    if not metrics:
        found.append("No task was evaluated: nothing is known about quality.")
    elif not metrics & GENERATIVE_METRICS:
        found.append("No task lets the model write; pruning can ruin generation while multiple choice looks intact.")
    if evaluation.get("limit"):
        found.append(f"Each task was cut to its first {evaluation['limit']} documents.")
    if metrics:
        found.append(
            "Standard errors treat the two models as independent; they answer the same documents, so a difference is "
            "usually better known than the errors say."
        )
    seeds = len(report["random"])
    if 0 < seeds < ENOUGH_SEEDS:
        found.append(f"With {seeds} random seed{'s' if seeds > 1 else ''} the spread of chance is poorly known.")
    ratio = report["ratio"]
    if "speed" not in ratio:
        found.append("Speed was not compared; fewer FLOPs are not by themselves a speed-up.")
    else:
        found.append("Speed and memory hold for the machine they were measured on; elsewhere the ratio may differ.")
        if seen := decode_ratios(report):
            low, high = map(format_percent, seen)
            found.append(f"Turn by turn, decoding ran at {low} to {high} of the original's speed.")
    notes = (note for side in ("baseline", "compressed") for note in report[side].get("notes", ()))
    found += [f"Of the derived costs: {note}." for note in dict.fromkeys(notes)]
    starved = (report["settings"].get("calibration") or {}).get("starved")
    if starved:
        experts = "1 expert" if len(starved) == 1 else f"{len(starved)} experts"
        found.append(f"{experts} saw too few calibration tokens for a score that means much.")
    if report["settings"].get("calibration"):
        found.append("Scores come from the calibration text; on text unlike it, other experts may matter.")
    return found


def _verdict(criterion: str, chosen: Mapping[str, Any], draws: Mapping[str, Any], others: str) -> str:
    if draws["beats_mean"] is None:
        return "cannot be judged (no value, or it is not known which direction is better)."
    does = "beats" if draws["beats_mean"] else "does not beat"
    sentence = f"{criterion} {does} the mean of {draws['count']} {others}"
    spread = draws["spread"]
    if spread is not None and abs(chosen["value"] - draws["mean"]) <= spread:
        sentence += (
            ", by no more than the spread over seeds" if draws["beats_mean"] else ", within the spread over seeds"
        )
    if draws["beats_mean"] and not draws["beats_best"]:
        sentence += "; the best seed is as good or better"
    return sentence + "."


def _change(report: Mapping[str, Any], key: str, label: str, formatter: Callable[[float], str]) -> list[str]:
    before, after = (report[side].get(key) for side in ("baseline", "compressed"))
    if after is None:
        return []
    if before is None:
        return [f"{label} {formatter(after)}"]
    return [f"{label} {formatter(before)} → {formatter(after)} ({format_percent(report['ratio'][key])})"]


def _plan_lines(index: int, plan: Mapping[str, Any]) -> list[str]:
    first, *rest = plan["summary"]
    return [f"* step {index}, {plan['op']}: {first}", *(f"  {line}" for line in rest)]


def _calibration_lines(calibration: Mapping[str, Any] | None) -> list[str]:
    if not calibration:
        return ["No calibration was needed or recorded."]
    lines = _settings_lines({key: value for key, value in calibration.items() if key != "starved"})
    starved = [f"layer {layer} expert {expert}" for layer, expert in calibration.get("starved", ())]
    found = f"{len(starved)}: {listed(starved, LISTED)}" if starved else "none"
    return [*lines, f"* experts with fewer tokens than the minimum: {found}"]


def _provenance_lines(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for kind, meaning in (
        ("measured", "Measured by running or counting"),
        ("derived", "Derived by formula or from other figures"),
    ):
        keys = [f"`{key}`" for key, value in report["provenance"].items() if value == kind]
        lines.append(f"* {meaning}: {', '.join(keys) or 'nothing'}.")
    return lines


def _settings_lines(settings: Mapping[str, Any] | None, indent: str = "") -> list[str]:
    lines = []
    for key, value in (settings or {}).items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}* {key}:", *_settings_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}* {key}: {_inline(value)}")
    return lines


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return listed([_inline(item) for item in value], LISTED) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _model(settings: Mapping[str, Any]) -> str:
    """The model's name; of a folder only the last part, since reports are published."""
    name = str(settings.get("model", "the model"))
    return PurePath(name).name if name.startswith(("/", ".", "~")) else name


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines]
