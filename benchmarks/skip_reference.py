"""The built-in model with half of its expert slots left out, untrained and trained: every way there is, by task.

    python -m benchmarks.skip_reference --folder DIR [--only NAME ...] [--speed]

Each row is a recipe, run as a person would run it, evaluated on whole tables of the `reference` tasks. The calibration
of untrained rows is 64 x 512 tokens of the packaged texts as they come; `skipped` is counted on them where tokens
differ, and FLOPs are derived from it. Rows that do not leave out half of the slots are controls.

Trained rows have the settings of the recipe `zeda-50`, but more text (`zeda_texts`), seen once; rows of two stages go
on from the row of the first. Halved rows learn in the same way, without zero experts. Both are trained again with other
seeds: of the texts, their order, the zero experts' rows and what is sampled. `skipped` is counted on the first 64
sequences that they learn from. Seconds are of training alone, in one process, on a shared machine.

Results go to `benchmarks/results/skip_reference.json` after every row; rows that are there already are kept while all
that decides them is the same, and trainings in DIR that are complete are not done again. `--speed` measures rows that
leave out half of the slots beside the original, in turn; it makes what is not in DIR, and wants a quiet machine. Not
covered: speed where experts are large (`skip_speed`), other models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moe_compress
from benchmarks.tables import SEED, skip_rivals
from benchmarks.zeda_texts import write_texts
from moe_compress.checkpoint.source import REFERENCE
from moe_compress.eval.config import EvalConfig
from moe_compress.eval.harness import evaluate
from moe_compress.eval.speed import measure_speed
from moe_compress.manifest import hardware, library_versions
from moe_compress.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "skip_reference.json"
CALIBRATION = {"dataset": "reference", "num_samples": 64, "sequence_length": 512, "batch_size": 8}
ROWS: dict[str, dict[str, Any] | None] = {
    "original": None,
    "top-2, shares of the 2": {"op": "topk", "k": 2, "normalise_over": "kept"},
    "top-2, shares of 4": {"op": "topk", "k": 2, "normalise_over": "picked"},
    "top-2, shares of 6": {"op": "topk", "k": 2, "normalise_over": 6},
    "top-2, shares of 8": {"op": "topk", "k": 2, "normalise_over": 8},
    "top-k by layer, 2 on average": {"op": "topk", "k": 2, "allocation": "per_layer"},
    "gate ratio by layer": {"op": "skip", "target_skip": 0.5},
    "gate ratio by layer, scaled up": {"op": "skip", "target_skip": 0.5, "renormalise": True},
    "gate ratio, one threshold": {"op": "skip", "target_skip": 0.5, "scope": "global"},
    "gate ratio by layer, 2 % protected": {"op": "skip", "target_skip": 0.5, "protect": 0.02},
    "gate ratio below the median (NAEE)": {"op": "skip", "threshold": "median", "renormalise": True},
    "16 zero experts, normal rows": {"op": "zero_experts", "count": 1.0},
    "gate ratio by layer, a third": {"op": "skip", "target_skip": 0.34},
    "8 zero experts, normal rows": {"op": "zero_experts"},
    "gate ratio by layer, a quarter": {"op": "skip", "target_skip": 0.23},
    "16 zero experts, tiled rows": {"op": "zero_experts", "count": 1.0, "init": "tile"},
}

RECIPE = load_recipe("zeda-50").model_dump(mode="json", exclude_unset=True)["steps"]
ZERO, OFF, ON = RECIPE
LAYERWISE = load_recipe("zeda-50-layerwise").model_dump(mode="json", exclude_unset=True)["steps"][1]
TEXTS = "texts.jsonl"
TEXT_BYTES = 3_900_000
REPEATED = ("epochs", "teacher")  # settings of a recipe that sees its few texts several times
OFF = {key: value for key, value in OFF.items() if key not in REPEATED}
OFF |= {"precision": "bfloat16", "data": {"dataset": TEXTS, "num_samples": 1024, "sequence_length": 512}}
ON = ON | {"precision": "bfloat16", "data": {"dataset": TEXTS, "num_samples": 512, "sequence_length": 256}}
SHORT = {"data": {"dataset": TEXTS, "num_samples": 128, "sequence_length": 512}, "batch_size": 4, "balance_alpha": 1.0}
HALVED = {"op": "topk", "k": 2, "normalise_over": "picked"}


def untargeted(step: dict[str, Any]) -> dict[str, Any]:
    """The same training for a model without zero experts."""
    return {key: value for key, value in step.items() if key not in ("target_skip", "balance_alpha")}


# Trained rows: the row that they go on from, and their steps.
TRAINED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "halved, trained off-policy": ("original", [HALVED, untargeted(OFF)]),
    "halved, trained in both stages": ("halved, trained off-policy", [untargeted(ON)]),
    "ZEDA, off-policy": ("original", [ZERO, OFF]),
    "ZEDA, both stages": ("ZEDA, off-policy", [ON]),
    "recipe zeda-50": ("original", RECIPE),
    "recipe zeda-50-layerwise": ("original", [ZERO, LAYERWISE]),
    "ZEDA, target 25 %": ("original", [ZERO, OFF | SHORT | {"target_skip": 0.25}]),
    "ZEDA, target 75 %": ("ZEDA, off-policy", [OFF | SHORT | {"target_skip": 0.75}]),
}
SEEDS = (1, 2)  # beside 0


def seeded(step: dict[str, Any], seed: int) -> dict[str, Any]:
    """The step with another seed of all that is drawn in it."""
    data = {"data": step["data"] | {"seed": seed}} if "data" in step else {}
    return step | data | ({} if step["op"] == "topk" else {"seed": seed})


for repeated in SEEDS:
    for row in (
        "halved, trained off-policy",
        "halved, trained in both stages",
        "ZEDA, off-policy",
        "ZEDA, both stages",
    ):
        start, trainings = TRAINED[row]
        mark = f"{SEED}{repeated}"
        origin = start if start == "original" else start + mark
        TRAINED[row + mark] = (origin, [seeded(step, repeated) for step in trainings])

BATCH_SIZES = (1, 16)
CONTROLS = ("ZEDA, target 25 %", "ZEDA, target 75 %")  # of the skip ratio alone: not evaluated by task


def settings() -> dict[str, Any]:
    """What decides the figures; the model is known by its bytes."""
    weights = b"".join(file.read_bytes() for file in sorted(REFERENCE.glob("*.safetensors")))
    return {
        "model": {"name": "reference", "weights_sha256": hashlib.sha256(weights).hexdigest()},
        "calibration": CALIBRATION,
        "hardware": hardware("cpu"),
        "versions": {"moe_compress": moe_compress.__version__} | library_versions(),
    }


def kept(made_with: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of an earlier run that this one would make again, and the speeds measured then."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if any(found.get(key) != value for key, value in made_with.items()):
        return [], []
    rows = [
        row
        for row in found["rows"]
        if row["name"] in [*ROWS, *TRAINED] and row.items() >= identity(row["name"]).items()
    ]
    return rows, found["speeds"]


def identity(name: str) -> dict[str, Any]:
    """What a row is: its step; of a trained row the row that it goes on from and all its steps."""
    if name in ROWS:
        return {"step": ROWS[name]}
    origin, steps = TRAINED[name]
    return {"from": origin, "steps": steps}


def trained(name: str, folder: Path) -> dict[str, Any]:
    """A trained row: what its training took, and the tasks unless it is a control."""
    out = checkpoint(name, folder)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))["compressed"]
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))["steps"]
    row = {"name": name} | identity(name) | {"plan": [line for entry in plan for line in entry["summary"]]}
    stages = [step for step in plan if step["op"] == "distill"]
    row |= flops(report) | {key: sum(stage[key] for stage in stages) for key in ("tokens", "seconds")}
    if name not in CONTROLS:
        row["tasks"] = by_task(evaluate(out, EvalConfig(tasks=["reference"]))["tasks"])
    return row


def checkpoint(name: str, folder: Path) -> Path:
    """The folder of a trained row, and of the row it goes on from; what is complete in `folder` is not done again."""
    origin, steps = TRAINED[name]
    out, texts = folder / slug(name), folder / TEXTS
    if (out / "report.json").exists():
        return out
    if not texts.exists():
        write_texts(texts, TEXT_BYTES)
    model = "reference" if origin == "original" else str(checkpoint(origin, folder))
    recipe = {
        "model": model,
        "calibration": CALIBRATION,
        "steps": [with_data(step, texts) | taught_by(origin) for step in steps],
        "export": {"tier": "plugin"},
        "eval": {"tasks": [], "baseline": False, "speed": False},
    }
    moe_compress.run(recipe, out, resume=True)
    return out


def slug(name: str) -> str:
    """A row's folder."""
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def with_data(step: dict[str, Any], texts: Path) -> dict[str, Any]:
    """The step with the texts where they lie."""
    return step | ({"data": step["data"] | {"dataset": str(texts)}} if "data" in step else {})


def taught_by(origin: str) -> dict[str, Any]:
    """The teacher, where the recipe does not begin with it."""
    return {} if origin == "original" else {"teacher_model": "reference"}


def flops(figures: dict[str, Any]) -> dict[str, float]:
    """Of a model in a report: the share of slots skipped, and the derived FLOPs."""
    names = ("expert_flops_per_token", "flops_per_token")
    return {"skipped": 1 - figures["experts_per_token_mean"] / 4} | {name: figures[name] for name in names}


def by_task(tasks: dict[str, Any]) -> dict[str, float]:
    """Headline figure of each task."""
    return {task.removeprefix("reference_"): next(iter(metrics.values()))["value"] for task, metrics in tasks.items()}


def made(name: str, step: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """One untrained row: the step, the experts that ran, and the tasks' headline figures."""
    shutil.rmtree(folder, ignore_errors=True)
    report = moe_compress.run(untrained(step, ["reference"]), folder)
    figures = report["compressed"]
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["steps"]
    row = {"name": name} | identity(name) | {"plan": [line for entry in plan for line in entry["summary"]]}
    return row | flops(figures) | {"tasks": by_task(figures["tasks"])}


def untrained(step: dict[str, Any] | None, tasks: list[str]) -> dict[str, Any]:
    """The recipe of an untrained row."""
    calibrated = step is not None and (step["op"] != "topk" or "allocation" in step)
    return {
        "model": "reference",
        "steps": [] if step is None else [step],
        "export": {"tier": "plugin"},
        "eval": {"tasks": tasks, "baseline": False, "speed": False},
    } | ({"calibration": CALIBRATION} if calibrated else {})


def measured(names: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Tokens per second of rows, one sequence and 16 at a time."""
    folders = {}
    for name in names:
        folders[name] = checkpoint(name, folder) if name in TRAINED else folder / slug(name)
        if not folders[name].exists():
            moe_compress.run(untrained(ROWS[name], []), folders[name])
    return [
        {
            "batch_size": size,
            "models": {name: {key: one[key] for key in ("speed", "speed_settings")} for name, one in found.items()},
        }
        for size in BATCH_SIZES
        for found in [measure_speed(folders, batch_size=size, new_tokens=32)]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are made; trained ones are kept")
    parser.add_argument("--only", nargs="+", choices=[*ROWS, *TRAINED], help="rows to make; all by default")
    parser.add_argument(
        "--speed", action="store_true", help="measure the speed of rows that are there, and nothing else"
    )
    given = parser.parse_args()
    made_with = settings()
    given.folder.mkdir(parents=True, exist_ok=True)
    order = [*ROWS, *TRAINED]
    if given.speed:
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
        rivals = [row["name"] for row in skip_rivals(found["rows"])]
        found["speeds"] = measured(["original", *(given.only or rivals)], given.folder)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    for name in given.only or order:
        rows, speeds = kept(made_with)
        if any(row["name"] == name for row in rows):
            continue
        row = made(name, ROWS[name], given.folder / "row") if name in ROWS else trained(name, given.folder)
        rows = sorted([*kept(made_with)[0], row], key=lambda row: order.index(row["name"]))
        RESULTS.write_text(json.dumps(made_with | {"rows": rows, "speeds": speeds}, indent=1) + "\n", encoding="utf-8")
        print(name, f"{row['skipped']:.3f}", row.get("tasks"), flush=True)


if __name__ == "__main__":
    main()
