"""The tables in the documents, written from `results/`, so that no figure in them is typed by hand.

    python -m benchmarks.tables

A table stands in a Markdown file between `<!-- table: NAME -->` and `<!-- end of table -->`, NAME one of `TABLES`. This
writes all of them anew; `tests/unit/test_figures.py` fails when one is not what the results say. A new benchmark needs
a function here and these two marks where its table should be.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.cells import TASKS, TEXTS, Rows, load, scores, short, span, table
from moe_compress.report.audit import criterion_rows
from moe_compress.text import format_bytes, format_percent

ROOT = Path(__file__).parents[1]
MARKS = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n.*?<!-- end of table -->", re.DOTALL)
HALF_WITHIN = 0.03  # of half of the slots, to be compared with rows that skip half
SEED = ", seed "  # in the name of a row that repeats another
BOTH_STAGES = ("halved, trained in both stages", "ZEDA, both stages")


def prune_reference() -> str:
    """Every criterion on every calibration set, and random prunings."""
    return table(["calibration", "criterion", *TASKS], _prune_rows(lambda row: True))


def prune_criteria() -> str:
    """The same for the packaged calibration text as it comes."""
    rows = _prune_rows(lambda row: row["calibration"] == "mixture")
    return table(["criterion", *TASKS], [row[1:] for row in rows])


def prune_readme() -> str:
    """One criterion beside the original and chance, in the words of a reader who knows neither."""
    found = load("prune_reference")
    names = ("code", "documentation", "facts", "reverse", "sums")
    rows = {row["criterion"]: row for row in found["rows"] if row["calibration"] in (None, "text 80 %")}
    random = {name: found["random"][name]["mean"] for name in names}
    header = ["", *(f"{name} {'↓' if name in TEXTS else '↑'}" for name in names)]
    return table(
        header,
        [
            ["original", *scores(rows["original"]["tasks"], names)],
            ["a quarter of the experts dropped by REAP", *scores(rows["reap"]["tasks"], names)],
            ["a quarter dropped at random, mean of five", *scores(random, names)],
        ],
    )


def _prune_rows(wanted: Callable[[Mapping[str, Any]], bool]) -> list[list[str]]:
    found = load("prune_reference")
    original = next(row for row in found["rows"] if row["criterion"] == "original")
    draws = sum(row["criterion"] == "random" for row in found["rows"])
    random = found["random"]
    rows = [
        ["", "original", *scores(original["tasks"])],
        ["", f"random, mean of {draws}", *scores({task: random[task]["mean"] for task in TASKS})],
        ["", "its standard deviation", *scores({task: random[task]["sd"] for task in TASKS})],
    ]
    chosen = [row for row in found["rows"] if row["calibration"] is not None and wanted(row)]
    return rows + [[row["calibration"], f"`{row['criterion']}`", *scores(row["tasks"])] for row in chosen]


def merge_reference() -> str:
    """Every way to merge beside pruning to the same number of experts."""
    rows = load("merge_reference")["rows"]
    return table(
        ["", "stored", *TASKS],
        [[row["name"], format_bytes(row["stored_bytes"]), *scores(row["tasks"])] for row in rows],
    )


def merge_short() -> str:
    """The rows of the documentation: pruning, every grouping as its paper merges, and differences."""
    names = ["original"]
    for keep in (12, 8):
        names += [f"{keep}: prune reap", *(f"{keep}: prune random {seed}" for seed in range(3))]
        names += [f"{keep}: merge {grouping}, align weights" for grouping in ("hc", "router", "ream")]
    names += [f"8: differences from {keep}" for keep in (1, 2, 4)]
    again = ("prune reap", "merge ream, align weights", "differences from 2", "differences from 4")
    names += [f"8: {name}, more text" for name in again]
    rows = {row["name"]: row for row in load("merge_reference")["rows"]}
    chosen = [rows[name] for name in names if name in rows]
    whole = rows["original"]["expert_bytes"]
    return table(
        ["", "bytes of routed experts", *TASKS],
        [[row["name"], format_percent(row["expert_bytes"] / whole), *scores(row["tasks"])] for row in chosen],
    )


def tie_reference() -> str:
    """Every part of tying, whole models at 60 % of their experts' bytes, and these distilled."""
    rows, lines = load("tie_reference")["rows"], []
    whole = rows[0]["expert_bytes"]
    for row in rows:
        took = [f"{row['tokens']:,}", f"{row['training_seconds'] / 60:.1f}"] if "tokens" in row else ["", ""]
        sizes = [format_bytes(row[key]) for key in ("stored_bytes", "resident_bytes")]
        shares = [format_percent(row["expert_bytes"] / whole), *sizes, f"{row['total_params'] / 1e6:.2f} M"]
        lines.append([row["name"], *shares, *took, *scores(row["tasks"])])
    return table(
        ["", "bytes of routed experts", "stored", "in memory", "parameters", "tokens", "minutes", *TASKS], lines
    )


def layerwise_memory() -> str:
    """Memory and time of training a large checkpoint layer by layer."""
    found, rows = load("layerwise_memory"), []
    for name, case in found["cases"].items():
        run = case["run"]
        stages = ", ".join(f"{stage} {time}" for stage, time in run["stages"].items())
        taken = [format_bytes(run[key]) for key in ("peak_rss_bytes", "peak_rss_bytes_children")]
        rows.append([name, format_bytes(found["checkpoint_bytes"]), *taken, f"{run['seconds'] / 60:.0f} min", stages])
    return table(["", "checkpoint", "peak of the run", "of the process that reloads", "time", "of which"], rows)


def skip_reference() -> str:
    """Every untrained way to run fewer experts per token."""
    rows = [row for row in load("skip_reference")["rows"] if "tokens" not in row]
    return table(
        ["", "slots skipped", *TASKS],
        [[row["name"], format_percent(row["skipped"]), *scores(row["tasks"])] for row in rows],
    )


def skip_trained() -> str:
    """The original, and half of its slots left out, untrained and trained; FLOPs as shares of the original's."""
    original, *others = load("skip_reference")["rows"]
    return table(
        ["", "slots skipped", "expert FLOPs", "FLOPs", *TASKS, "mean of the six", "tokens", "minutes"],
        [
            [
                row["name"],
                format_percent(row["skipped"]),
                format_percent(row["expert_flops_per_token"] / original["expert_flops_per_token"]),
                format_percent(row["flops_per_token"] / original["flops_per_token"]),
                *scores(row["tasks"]),
                f"{mean_of_six(row):.2f}",
                *_training(row, others),
            ]
            for row in [original, *skip_rivals(others)]
        ],
    )


def skip_rivals(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows that leave out about half of the slots, or were trained to; none that repeats another with its own seed."""
    once = [row for row in rows if "tasks" in row and SEED not in row["name"]]
    return [row for row in once if abs(row["skipped"] - 0.5) < HALF_WITHIN or "tokens" in row]


def _training(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tokens and minutes of all stages of a row."""
    if "tokens" not in row:
        return ["", ""]
    stages = [row, *(earlier for earlier in rows if earlier["name"] == row["from"])]
    tokens, seconds = (sum(stage[key] for stage in stages) for key in ("tokens", "seconds"))
    return [f"{tokens:,}", f"{seconds / 60:.1f}"]


def skip_seeds() -> str:
    """A halved top-k and zero experts, trained in both stages with each seed, and the mean of each."""
    rows = [row for row in load("skip_reference")["rows"] if row["name"].partition(SEED)[0] in BOTH_STAGES]
    cells = []
    for method in BOTH_STAGES:
        own = [row for row in rows if row["name"].partition(SEED)[0] == method]
        lines = [(row["name"].partition(SEED)[2] or "0", [row]) for row in own]
        for seed, some in [*lines, (f"mean of {len(own)}", own)]:
            figures = {name: mean(row["tasks"][name] for row in some) for name in TASKS}
            skipped, six = (mean(figure(row) for row in some) for figure in (lambda row: row["skipped"], mean_of_six))
            cells.append([method, seed, format_percent(skipped), *scores(figures), f"{six:.2f}"])
    return table(["", "seed", "slots skipped", *TASKS, "mean of the six"], cells)


def mean_of_six(row: Mapping[str, Any]) -> float:
    """Of the tasks that are not bits per byte, in points."""
    return 100 * mean(row["tasks"][name] for name in TASKS if name not in TEXTS)


def skip_rivals_speed() -> str:
    """Speed of the rows beside the original's, measured in one run."""
    speeds, cells = load("skip_reference")["speeds"], []
    for name in list(speeds[0]["models"])[1:]:
        ratios = [
            found["models"][name]["speed"][rate] / found["models"]["original"]["speed"][rate]
            for found in speeds
            for rate in ("prefill_tokens_per_s", "decode_tokens_per_s")
        ]
        cells.append([name, *(f"{ratio:.2f}" for ratio in ratios)])
    kinds = [f"{kind}, batch {found['batch_size']}" for found in speeds for kind in ("prefill", "decode")]
    return table(["", *kinds], cells)


def skip_control() -> str:
    """Skip ratios asked for and counted."""
    rows = [row for row in load("skip_reference")["rows"] if _asked(row)]
    return table(
        ["", "asked", "counted", "tokens"],
        [[row["name"], f"{_asked(row):.0%}", format_percent(row["skipped"]), f"{row['tokens']:,}"] for row in rows],
    )


def _asked(row: Mapping[str, Any]) -> float | None:
    """The skip ratio that a row was trained for."""
    found: float | None = row["steps"][-1].get("target_skip") if "tokens" in row else None
    return found


def skip_speed() -> str:
    """Time of the experts of one layer, ours beside those of transformers."""
    names = ("eager", "grouped_mm", "batched_mm", "ours", "ours, half skipped")
    rows = load("skip_speed")["functions"]["rows"]
    return table(
        ["shape", "type", "tokens", *names],
        [
            [
                row["shape"],
                row["dtype"],
                str(row["tokens"]),
                *(f"{1e3 * row['seconds'][name]:.3f} ms" if name in row["seconds"] else "" for name in names),
            ]
            for row in rows
        ],
    )


def skip_models() -> str:
    """Tokens per second of models, half of the slots skipped."""
    rows, kinds = [], ("prefill", "decode")
    for row in load("skip_speed")["models"]["rows"]:
        cells = [row["model"], str(row["settings"]["batch_size"])]
        for kind in kinds:
            key = f"{kind}_tokens_per_s"
            cells += [f"{row['speeds'][side][key]:,.0f}" for side in ("original", "adapted")]
            cells += [format_percent(row["skipped"][kind]), f"{row['ratio'][key]:.2f}"]
        rows.append(cells)
    columns = (", tokens/s", " with slots skipped", ", how many", ", ratio")
    return table(["", "batch", *(kind + column for kind in kinds for column in columns)], rows)


ALLOCATIONS = {
    "original": "original",
    "lp output_error, projections": "program, `output_error`, by projection",
    "lp fisher, projections, from 2 bits": "program, `fisher`, by projection, from 2 bits",
    "lp output_error, projections, from 2 bits": "program, `output_error`, by projection, from 2 bits",
    "lp fisher, projections": "program, `fisher`, by projection",
    "lp fisher, from 2 bits": "program, `fisher`, by expert, from 2 bits",
    "lp fisher": "program, `fisher`, by expert",
    "uniform 2/3 by frequency": "2 bits, 3 for the most used experts",
    "uniform 2/3 by layer": "2 bits, 3 for the first layers",
    "lp output_error": "program, `output_error`, by expert",
    "lp pmq": "program, `pmq`",
    "lp pmq_as_released": "program, `pmq_as_released`",
}
ALLOCATION_TASKS = ("code", "documentation", "facts", "sums")


def quantize_allocations() -> str:
    """What each way to spend 2.5 bits costs."""
    rows = load("quantize_reference")["rows"]
    named = sorted(ALLOCATIONS, key=lambda name: (name != "original", rows[name]["mean_bits_per_byte"]))
    best = named[1]
    lines = []
    for name in named:
        mean = f"{rows[name]['mean_bits_per_byte']:.4f}"
        found = scores(short(rows[name]["tasks"]), ALLOCATION_TASKS)
        lines.append([ALLOCATIONS[name], f"**{mean}**" if name == best else mean, *found])
    draws = [rows[name] for name in rows if re.fullmatch(r"random \d+", name)]
    ranges = [span([row["mean_bits_per_byte"] for row in draws], 4)]
    for task in ALLOCATION_TASKS:
        ranges.append(span([short(row["tasks"])[task] for row in draws], 4 if task in TEXTS else 3))
    return table(["allocation", "mean", *ALLOCATION_TASKS], [*lines, [f"by lot, {len(draws)} seeds", *ranges]])


SIZES = {
    "original": "original",
    "4 bits": "GPTQ, 4 bits for all experts",
    "frontier rtn 4": "rounded, 4 bits for all",
    "frontier gptq 3": "GPTQ, 3 bits for all",
    "frontier rtn 3": "rounded, 3 bits for all",
    "lp output_error, projections": "GPTQ, 2.5 bits on average, chosen by the program",
    "pruned to 75 %, then 3 bits": "a quarter pruned by REAP, then GPTQ, 3 bits",
    "joint drop and bits": "experts to drop and bits in one program, to the same size",
    "frontier gptq 2": "GPTQ, 2 bits for all",
    "frontier rtn 2": "rounded, 2 bits for all",
}


def quantize_sizes() -> str:
    """Size against quality, the means over two texts."""
    return _sizes(SIZES)


def quantize_readme() -> str:
    """The same, four rows of it."""
    return _sizes(
        {name: SIZES[name] for name in ("original", "4 bits", "lp output_error, projections", "frontier gptq 2")}
    )


def _sizes(names: Mapping[str, str]) -> str:
    rows = load("quantize_reference")["rows"]
    return table(
        ["routed experts", "stored", "of the original", "mean bits per byte"],
        [
            [
                names[name],
                format_bytes(rows[name]["stored_bytes"]),
                f"{rows[name]['stored_bytes'] / rows['original']['stored_bytes']:.1%}".replace("%", " %"),
                f"{rows[name]['mean_bits_per_byte']:.4f}",
            ]
            for name in sorted(names, key=lambda name: -rows[name]["stored_bytes"])
        ],
    )


FRONTIERS = {"lp": "chosen from 1 to 4 bits", "lp-from-2": "chosen from 2 to 6 bits", "gptq": "GPTQ", "rtn": "rounded"}


def quantize_frontier() -> str:
    """Mean bits per byte by bits per expert weight, chosen and the same for all."""
    rows = load("quantize_reference")["rows"]
    budgets = sorted({name.split()[-1] for name in rows if name.startswith("frontier")}, key=float)
    found = {
        (kind, float(budget)): rows[f"frontier {kind} {budget}"]["mean_bits_per_byte"]
        for kind in FRONTIERS
        for budget in budgets
        if f"frontier {kind} {budget}" in rows
    }
    return table(
        ["bits", *FRONTIERS.values()],
        [
            [f"{bits:.1f}", *(f"{found[kind, bits]:.4f}" if (kind, bits) in found else "" for kind in FRONTIERS)]
            for bits in sorted({bits for _, bits in found})
        ],
    )


def distill_reference() -> str:
    """The pruned model before and after distillation in several ways."""
    rows = []
    for row in load("distill_reference")["rows"]:
        took = [f"{row['tokens']:,}", f"{row['seconds'] / 60:.1f}"] if row["settings"] else ["", ""]
        rows.append([row["name"], *took, *scores(row["tasks"])])
    return table(["", "tokens", "minutes", *TASKS], rows)


def streaming() -> str:
    """Time, memory and disk traffic beside those of `cp -r`."""
    found = load("streaming")
    labels = {
        "cp": "`cp -r`",
        "identity": "all layers through memory, unchanged",
        "prune_75": "pruned to 75 %",
    }
    rows = []
    for name, runs in found["runs"].items():
        seconds = median(run["seconds"] for run in runs)
        processes = [max(run["peak_rss_bytes"], run["peak_rss_bytes_children"]) for run in runs]
        stages = ", ".join(f"{stage} {time}" for stage, time in runs[0].get("stages", {}).items())
        traffic = [format_bytes(median(run[key] for run in runs)) for key in ("disk_read", "disk_written")]
        rows.append([labels[name], f"{seconds:.1f} s", stages, format_bytes(max(processes)), *traffic])
    return table(["", "time", "of which", "largest process", "read", "written"], rows)


def kill_resume() -> str:
    """Where runs were killed, and what the resumed ones wrote."""
    kills = load("kill_resume")["kills"]
    counts = Counter(kill["stage"] for kill in kills)
    same = Counter(kill["stage"] for kill in kills if kill["identical"])
    left = Counter(kill["stage"] for kill in kills if kill["left_behind"])
    return table(
        ["killed during", "runs", "resumed to the same bits", "left something behind"],
        [[stage, str(count), str(same[stage]), str(left[stage])] for stage, count in counts.items()],
    )


def allocation() -> str:
    """Seconds to model and solve each problem, and the gap that is proven."""
    problems = load("allocation")["problems"]
    return table(
        ["budget", "seconds (median)", "all", "proven gap"],
        [
            [
                name.replace("_", " "),
                f"{found['median_seconds']:.1f}",
                ", ".join(f"{seconds:.1f}" for seconds in found["seconds"]),
                f"{found['gap']:.0e}" if found["gap"] else "0",
            ]
            for name, found in problems.items()
        ],
    )


def lm_eval_reference() -> str:
    """lm-eval's own tasks on the built-in model."""
    found = load("lm_eval_reference")
    return table(
        ["task", "shots", "documents", "metric", "value", "standard error"],
        [
            [
                task,
                str(found["settings"]["num_fewshot"][task]),
                str(found["settings"]["num_documents"][task]),
                metric,
                f"{value['value']:.3f}",
                f"{value['stderr']:.3f}",
            ]
            for task, metrics in found["tasks"].items()
            for metric, value in metrics.items()
        ],
    )


def gptq_speed() -> str:
    """Both sides of the comparison: medians, and what became of the model."""
    found = load("gptq_speed")
    runs, quality, sizes = found["runs"], found["quality"], found["stored_bytes"]
    rows = []
    for label, key, shown in (
        ("quantize step", "quantize_seconds", "{:.1f} s"),
        ("the same, processor time", "quantize_processor_seconds", "{:.1f} s"),
        ("whole command", "seconds", "{:.1f} s"),
        ("the same, processor time", "processor_seconds", "{:.1f} s"),
        ("peak memory by the end of the step", "quantize_peak_rss_bytes", "{}"),
        ("peak memory of all processes", "peak_rss_bytes", "{}"),
    ):
        ours, theirs = (median(run[key] for run in runs[side]) for side in ("ours", "theirs"))
        texts = [format_bytes(v) if key.endswith("bytes") else shown.format(v) for v in (ours, theirs)]
        rows.append([label, *texts, f"{theirs / ours:.2f}"])
    rows.append(["perplexity (original {:.2f})".format(quality["original"]["perplexity"])])
    rows[-1] += [f"{quality[side]['perplexity']:.2f}" for side in ("ours", "theirs")] + [""]
    errors = [quality[side]["layer_output_error"] for side in ("ours", "theirs")]
    rows.append(["error of the layers' outputs", *(", ".join(f"{e:.4f}" for e in side) for side in errors), ""])
    rows.append(["stored", *(format_bytes(sizes[side]) for side in ("ours", "theirs")), ""])
    return table(["", "moe-compress", "llm-compressor", "theirs / ours"], rows)


PREDICTED = {"stored_bytes": "stored", "peak_process_bytes": "memory", "peak_host_bytes": "memory, all processes"}


def plan_accuracy() -> str:
    """What a plan predicts beside what the run took."""
    rows = []
    for model, recipes in load("plan_accuracy")["results"].items():
        for recipe, found in recipes.items():
            row = [model, recipe]
            for name in PREDICTED:
                pair = found[name]
                row += [format_bytes(pair["predicted"]), format_bytes(pair["measured"]), f"{pair['ratio']:.3f}"]
            rows.append(row)
    header = [
        "model",
        "recipe",
        *(text for name in PREDICTED.values() for text in (f"{name}: predicted", "taken", "ratio")),
    ]
    return table(header, rows)


def audit_reference() -> str:
    """How every criterion ranks the built-in model's experts by what taking them out costs."""
    return table(*_head_and_rows(criterion_rows(load("audit_reference"))))


def _head_and_rows(rows: Sequence[Sequence[str]]) -> tuple[Sequence[str], Rows]:
    return rows[0], rows[1:]


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (
        prune_reference, prune_criteria, prune_readme, merge_reference, merge_short, tie_reference, skip_reference,
        skip_trained, skip_seeds, skip_rivals_speed, skip_control, skip_speed, skip_models, distill_reference,
        quantize_allocations, quantize_sizes, quantize_readme, quantize_frontier,
        streaming, layerwise_memory, kill_resume, allocation, lm_eval_reference, gptq_speed, plan_accuracy,
        audit_reference,
    )
}  # fmt: skip


def documents() -> list[Path]:
    """The Markdown files that may hold tables."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def filled(text: str) -> str:
    """The text with every table as the results have it; KeyError: a table of that name is not known."""

    def fill(found: re.Match[str]) -> str:
        return f"<!-- table: {found['name']} -->\n{TABLES[found['name']]()}\n<!-- end of table -->"

    return MARKS.sub(fill, text)


def main() -> None:
    """Write all tables anew."""
    for file in documents():
        before = file.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            file.write_text(after, encoding="utf-8")
            print(f"{file.relative_to(ROOT)}: tables written")


if __name__ == "__main__":
    main()
