"""What the command line prints: the dicts of `pipeline` as tables on stdout. It measures nothing.

Tables keep their full width when stdout is no terminal, so that nothing is cut in a file or a pipe.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_compress.text import format_bytes, format_count, format_flops, format_number, format_percent, listed

TIERS = {
    "stock": "plain transformers loads the result",
    "plugin": "the result needs this package to load",
}
PIPE_WIDTH = 200  # columns where no terminal says its own
FIGURE_WIDTH = 24  # characters; a longer cell is no figure
MAX_LISTED = 8  # starved experts named one by one


def print_json(data: object) -> None:
    """`data` as indented JSON."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Rows of text; the first is the header, the first column names the row, figures stand to the right."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(rows[0]):
        cells = [row[index] for row in rows[1:]]
        short = all(len(cell) <= FIGURE_WIDTH for cell in cells)
        figures = index > 0 and short and any(cell[:1].isdigit() for cell in cells)
        table.add_column(Text(name), justify="right" if figures else "left")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    _console().print(table)


def print_inspection(facts: Mapping[str, Any]) -> None:
    """What `pipeline.inspect` found."""
    shared = ", and shared experts" if facts["shared_experts"] else ""
    print(f"{facts['model']}: {facts['architecture']} ({facts['model_type']}, {facts['dtype']})")
    print(
        f"{facts['num_layers']} layers, {len(facts['moe_layers'])} of them with {facts['num_experts']} experts, "
        f"{facts['experts_per_token']:.4g} per token{shared}"
    )
    columns = (facts["params"], format_count), (facts["bytes"], format_bytes), (facts["flops_per_token"], format_flops)
    rows = [["part", "parameters", "stored", "FLOPs per token"]]
    for part in dict.fromkeys(part for values, _ in columns for part, value in values.items() if value):
        figures = (show(values[part]) if part in values else "-" for values, show in columns)
        rows.append([part.replace("_", " "), *figures])
    flops = format_flops(sum(facts["flops_per_token"].values()))
    rows.append(["all", format_count(facts["total_params"]), format_bytes(facts["stored_bytes"]), flops])
    print_table(rows)
    print(f"FLOPs hold for a prompt of {facts['context']:,} tokens; stored bytes by part are {facts['bytes_are']}")
    print(f"active parameters per token: {format_count(facts['active_params'])}")
    print(f"KV cache per token: {format_bytes(facts['kv_bytes_per_token'])}")
    for note in facts["notes"]:
        print(f"of the derived costs: {note}")
    for sentence in facts["tiers"]:
        print(sentence)
    if "routing" in facts:
        print_routing(facts["routing"])


def print_routing(health: Mapping[str, Any]) -> None:
    """Routing health, layer by layer, and what it means."""
    header = ["layer", "least used", "most used", "used evenly", "dead", "super experts"]
    header += ["SRP, 16 tokens", "by chance", "hits at top-k", "at 2 x", "at 3 x"]
    rows = [header]
    for layer in [*health["layers"], {"layer": "all", **health}]:
        loads = [f"{layer[name]:.2f}" if name in layer else "" for name in ("smallest_load", "largest_load")]
        even = format_percent(layer["used_evenly"]) if "used_evenly" in layer else ""
        supers = [str(len(layer["super"]))] if layer["layer"] == "all" else [" ".join(map(str, layer["super"]))]
        routing = layer.get("srp", {}).get("16", {})
        consistency = [f"{routing[name]:.3f}" if routing else "-" for name in ("value", "by_chance")]
        rates = layer.get("hit_rates", {})
        hits = [format_percent(rates[ratio]) if ratio in rates else "-" for ratio in ("1", "2", "3")]
        rows.append([str(layer["layer"]), *loads, even, str(len(layer["dead"])), *supers, *consistency, *hits])
    print_table(rows, title=f"routing of {health['tokens']:,} calibration tokens; loads in multiples of the mean")
    dead = [f"{layer}/{expert}" for layer, expert in health["dead"]]
    if dead:
        print(f"never used (layer/expert): {listed(dead, MAX_LISTED)}")
    for sentence in health["offloading"]:
        print(f"offloading: {sentence}")


def print_audit(found: Mapping[str, Any]) -> None:
    """The criteria of an audit, best first, and what follows."""
    from moe_compress.report.audit import criterion_rows, verdicts

    count = sum(len(layer["experts"]) for layer in found["layers"])
    print_table(criterion_rows(found), title=f"{count} experts of {len(found['layers'])} layers taken out one by one")
    for sentence in verdicts(found):
        print(f"audit: {sentence}")


def print_score_summary(summary: Mapping[str, Any]) -> None:
    """What `score` measured, and the experts that saw too few tokens."""
    print(
        f"{summary['experts']} experts in {summary['moe_layers']} layers, {summary['calibration_tokens']:,} "
        f"calibration tokens; the least used expert was routed {summary['fewest_tokens_per_expert']:,}"
    )
    starved = [f"{layer}/{expert}" for layer, expert in summary["starved"]]
    if starved:
        print(f"starved (layer/expert): {listed(starved, MAX_LISTED)}; calibrate on more tokens")


def print_plan(planned: Mapping[str, Any]) -> None:
    """What `pipeline.plan` decided for each layer, and the sizes it predicts."""
    from moe_compress.report.tables import FIGURES, figure_label

    for index, step in enumerate(planned["steps"]):
        print(f"steps.{index}: {step['op']}, {_settings(step)}")
        for line in step["summary"]:
            print(f"  {line}")
        _print_layers(step.get("layers", ()))
    rows = [["predicted", "baseline", "compressed", "ratio"]]
    for path, label, show in FIGURES:
        before, after = (planned[side].get(path[0]) for side in ("baseline", "predicted"))
        if len(path) == 1 and before and after is not None:
            label = figure_label(path, label, planned["predicted"])
            rows.append([label, show(before), show(after), format_percent(after / before)])
    print_table(rows)
    _print_parts(planned["baseline"], planned["predicted"])
    for note in planned["baseline"].get("notes", ()):
        print(f"of the derived costs: {note}")
    print(f"tier: {planned['tier']}, {TIERS[planned['tier']]}")
    print(f"disk needed while it runs: {format_bytes(planned['disk_needed'])}")
    _print_memory(planned["memory"])
    if "time" in planned:
        _print_time(planned["time"])
    for warning in planned["warnings"]:
        print(f"warning: {warning}")


def _print_parts(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Parameters and bytes by part of the model, before and after."""
    rows = [["part", "parameters", "after", "stored", "after"]]
    parts = dict.fromkeys([*before["params_by_part"], *before["bytes_by_part"]])
    for part in parts:
        row = [part.replace("_", " ")]
        for name, show in (("params_by_part", format_count), ("bytes_by_part", format_bytes)):
            row += [show(side[name][part]) if part in side[name] else "-" for side in (before, after)]
        rows.append(row)
    print_table(rows)


def _print_memory(memory: Mapping[str, Any]) -> None:
    """The largest memory, and when it is reached."""
    print(
        f"memory: about {format_bytes(memory['process'])} at most ({memory['process_stage']}); with the processes it "
        f"starts {format_bytes(memory['host'])} ({memory['host_stage']})"
    )
    if memory["evaluation"] > memory["host"]:
        print(f"whole models are evaluated where there are {format_bytes(memory['evaluation'])}, else that is left out")
    if memory["device"]:
        print(f"memory of the device: about {format_bytes(memory['device'])} (derived, not checked against runs)")


def _print_time(time: Mapping[str, Any]) -> None:
    """How long a run takes, and what that rests on."""
    each = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in time["stages"].items())
    print(
        f"time: about {_duration(time['seconds'])} without evaluation ({each}), as this machine copies "
        f"{format_bytes(time['copy_bytes_per_s'])}/s and multiplies {format_flops(time['flops_per_s'])}/s now"
    )


def _duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_report(report: Mapping[str, Any]) -> None:
    """A report's comparison, the random baselines beside it, and its checks, as far as it has them."""
    from moe_compress.report.tables import summary_rows

    rows = [[row.label, row.baseline, row.compressed, row.ratio, row.recovery] for row in summary_rows(report)]
    print_table([["", "baseline", "compressed", "ratio", "recovery"], *rows])
    for side in ("baseline", "compressed"):
        for what, reason in report[side].get("not_measured", {}).items():
            print(f"{what} of the {side} model: not measured: {reason}")
    if report.get("random_summary"):
        print_table(_random_rows(report))
    if report.get("checks"):
        print_checks(report["checks"])


def print_checks(checks: Mapping[str, Mapping[str, Any]]) -> None:
    """Each check with what it found."""
    rows = [[name, "passed" if check["passed"] else "FAILED", check["detail"]] for name, check in checks.items()]
    if rows:
        print_table([["check", "result", "detail"], *rows])


def print_push(planned: Mapping[str, Any], hub: str) -> None:
    """What a push will upload, where to, and what it will remove there."""
    state = {None: "", True: "existing, ", False: "new, "}[planned["exists"]]
    visibility = (
        "private"
        if planned["private"]
        else "public" + (" unless its owner's default is private") * (planned["exists"] is not True)
    )
    print(f"to {hub}/{planned['repo_id']} ({state}{visibility}), branch {planned['revision']}:")
    print_table([["file", "size"], *([name, format_bytes(size)] for name, size in planned["files"].items())])
    print(
        f"{len(planned['files'])} files, {format_bytes(planned['bytes'])} ({planned['bytes']:,} bytes), in one commit"
    )
    for verb, key in (
        ("removed there, of an earlier checkpoint", "removed"),
        ("left out, no run wrote it", "left_out"),
    ):
        if planned[key]:
            print(f"{verb}: {listed(planned[key], MAX_LISTED)}")
    if planned["note"]:
        print(f"note: {planned['note']}")


def _random_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The chosen criterion beside the random baselines: their mean and the best of them."""
    from moe_compress.report.tables import NOTHING, format_metric, metric_label

    rows = [["", "compressed", "random: mean", "random: best", "seeds"]]
    for task, metrics in report["random_summary"].items():
        for name, draws in metrics.items():
            chosen = report["compressed"]["tasks"][task][name]
            best = NOTHING if draws["best"] is None else format_number(draws["best"])
            label = metric_label(task, name, chosen.get("higher_is_better"))
            rows.append([label, format_metric(chosen), format_number(draws["mean"]), best, str(draws["count"])])
    return rows


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)


def print_frontier(setting: str, found: Sequence[Mapping[str, Any]]) -> None:
    """Bytes against predicted loss, a line for each budget."""
    from moe_compress.report.tables import NOTHING

    rows = [["budget", "bits per weight", "stored size", "experts dropped", "predicted loss", "proven"]]
    for entry in found:
        budget = f"{entry[setting]:g}" if setting == "average_bits" else format_bytes(entry[setting])
        if entry["infeasible"]:
            rows.append([budget, *[NOTHING] * 4, f"cannot be met: {entry['infeasible']}"])
            continue
        proven = "optimal" if entry["optimal"] else f"above {entry['relaxation_bound']:.4g}"
        stored = format_bytes(entry["stored"])
        loss = f"{entry['predicted_loss']:.4g}"
        rows.append([budget, f"{entry['bits']:.3f}", stored, str(entry["dropped_experts"]), loss, proven])
    print_table(rows)


def _settings(step: Mapping[str, Any]) -> str:
    """The settings a step was given, those that are one value."""
    words = (f"{key} {value}" for key, value in step.items() if key != "op" and isinstance(value, str | int | float))
    return ", ".join(words)


def _print_layers(layers: Sequence[Mapping[str, Any]]) -> None:
    """Which experts of each layer stay, and in how many bits; neighbours that are alike share a row."""
    if not layers:
        return
    rows = [["layer", "experts", "kept", "bits" if "options" in layers[0] else "which"]]
    for what, alike in groupby(layers, _layer_words):
        numbers = [layer["layer"] for layer in alike]
        rows.append([f"{numbers[0]} to {numbers[-1]}" if numbers[1:] else str(numbers[0]), *what])
    print_table(rows)


def _layer_words(layer: Mapping[str, Any]) -> tuple[str, str, str]:
    """How many experts a layer has, how many stay, and which, or in how many bits."""
    kept = layer["keep"]
    names = Counter(name for options in layer.get("options", {}).values() for name in options)
    shares = [f"{count / sum(names.values()):.0%} at {name}" for name, count in sorted(names.items())]
    return str(layer["num_experts"]), str(len(kept)), ", ".join(shares) or " ".join(map(str, kept))
