"""The built-in model pruned to 50 % by REAP, before and after distillation, in several ways.

    python -m benchmarks.distill_reference [--folder DIR]

The model is pruned once; every row distils it from the original on the packaged calibration texts (the
settings are in the results), and is evaluated on whole tables of the `reference` tasks. `seconds` are wall-clock of the
training alone, on a shared machine; `other_seconds` those of all else in the run: the teacher's logits, the checks.

Results go to `benchmarks/results/distill_reference.json` after every row; rows that are already there are kept when
nothing that decides them has changed. Not covered: other budgets and learning rates, other models, more text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from moe_compress import __version__, run
from moe_compress.checkpoint.source import REFERENCE
from moe_compress.compress.distill.state import read_metrics
from moe_compress.eval.config import EvalConfig
from moe_compress.eval.harness import evaluate
from moe_compress.manifest import hardware, library_versions
from moe_compress.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "distill_reference.json"
PACKAGED = load_recipe("prune-distill").model_dump(mode="json", exclude_unset=True)
PRUNE, DISTILL = PACKAGED["steps"]
LAYERWISE = {
    "op": "distill", "mode": "layerwise", "trainable": DISTILL["trainable"], "batch_size": 4, "micro_batch_size": 2,
    "learning_rate": 0.003, "data": DISTILL["data"] | {"num_samples": 64},
}  # fmt: skip
ROWS: dict[str, dict[str, Any] | None] = {
    "original": None,
    "pruned": None,
    "recipe prune-distill": DISTILL,
    "layerwise": LAYERWISE,
    "routers and norms": DISTILL | {"trainable": ["routers", "norms"], "data": DISTILL["data"] | {"num_samples": 64}},
}

Row = dict[str, Any]


def pruned(folder: Path) -> Path:
    """The original without half of its experts."""
    out = folder / "pruned"
    if not out.exists():
        settings = {"calibration": PACKAGED["calibration"], "eval": {"tasks": [], "speed": False}}
        run({"model": "reference", "steps": [PRUNE]} | settings, out)
    return out


def distilled(step: dict[str, Any], folder: Path) -> tuple[Path, Row]:
    """The pruned model distilled from the original, and what that took."""
    out = folder / "distilled"
    recipe = {
        "model": str(pruned(folder)),
        "steps": [step | {"teacher_model": "reference"}],
        "eval": {"tasks": [], "speed": False},
    }
    started = time.monotonic()
    run(recipe, out, keep_steps=True, force=True)
    elapsed = time.monotonic() - started
    lines = read_metrics(out.with_name("distilled.work") / "step-0" / "training")
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))["steps"][0]
    seconds = round(sum(line["seconds"] for line in lines), 1)
    found = {"tokens": plan["tokens"], "seconds": seconds, "other_seconds": round(elapsed - seconds, 1)}
    return out, found | {"losses": [round(point["loss"], 5) for point in plan["curve"]]}


def figures(folder: Path) -> dict[str, float]:
    """Headline figure of each task; every packaged task has one metric."""
    tasks = evaluate(folder, EvalConfig(tasks=["reference"]))["tasks"]
    return {task.removeprefix("reference_"): next(iter(metrics.values()))["value"] for task, metrics in tasks.items()}


def kept_rows(made_with: dict[str, Any]) -> list[Row]:
    """Rows of an earlier run that this one would make again."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if any(found.get(key) != value for key, value in made_with.items()):
        return []
    return [row for row in found["rows"] if row["name"] in ROWS and row["settings"] == ROWS[row["name"]]]


def table(rows: list[Row]) -> str:
    """One line per row."""
    lines = [["", "tokens", "minutes", *(task[:6] for task in rows[0]["tasks"])]]
    for row in rows:
        took = [f"{row['tokens']:,}", f"{row['seconds'] / 60:.1f}"] if row["settings"] else ["", ""]
        lines.append([row["name"], *took, *(f"{value:.3f}" for value in row["tasks"].values())])
    return "\n".join(f"{line[0]:<22}" + "".join(f"{cell:>9}" for cell in line[1:]) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder unless given")
    arguments = parser.parse_args()
    made_with = {"prune": PRUNE, "calibration": PACKAGED["calibration"], "hardware": hardware("cpu")}
    made_with |= {"versions": {"moe_compress": __version__} | library_versions()}
    rows = kept_rows(made_with)
    with tempfile.TemporaryDirectory(prefix="distill-reference-", dir=arguments.folder) as name:
        folder = Path(name)
        for title, step in ROWS.items():
            if title in {row["name"] for row in rows}:
                continue
            row: Row = {"name": title, "settings": step}
            model = REFERENCE if title == "original" else pruned(folder)
            if step is not None:
                model, found = distilled(step, folder)
                row |= found
            row["tasks"] = figures(model)
            shutil.rmtree(folder / "distilled.work", ignore_errors=True)
            rows = sorted([*rows, row], key=lambda row: list(ROWS).index(row["name"]))
            RESULTS.write_text(json.dumps(made_with | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
            print(f"{title}: {json.dumps(row['tasks'])}", flush=True)
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
