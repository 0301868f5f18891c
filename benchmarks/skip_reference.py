"""The built-in model with half of its expert slots left out and nothing trained: every way there is, by task.

    python -m benchmarks.skip_reference [--folder DIR] [--only NAME ...]

Each row is a recipe of one step, run as a person would run it, evaluated on whole tables of the `reference` tasks. The
calibration is 64 x 512 tokens of the packaged texts as they come; `skipped` is counted on them where tokens differ, and
FLOPs are derived from it. Rows that do not leave out half of the slots are controls.

Results go to `benchmarks/results/skip_reference.json` after every row; rows that are there already are kept while all
that decides them is the same. Not covered: training (no row was trained), speed (`skip_speed`), other models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import moe_compress
from moe_compress.checkpoint.source import REFERENCE
from moe_compress.manifest import hardware, library_versions

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


def settings() -> dict[str, Any]:
    """What decides the figures; the model is known by its bytes."""
    weights = b"".join(file.read_bytes() for file in sorted(REFERENCE.glob("*.safetensors")))
    return {
        "model": {"name": "reference", "weights_sha256": hashlib.sha256(weights).hexdigest()},
        "calibration": CALIBRATION,
        "hardware": hardware("cpu"),
        "versions": {"moe_compress": moe_compress.__version__} | library_versions(),
    }


def kept_rows(made_with: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run that this one would make again."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if any(found.get(key) != value for key, value in made_with.items()):
        return []
    return [row for row in found["rows"] if ROWS.get(row["name"], ()) == row["step"]]


def made(name: str, step: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """One row: the step, the experts that ran, and the tasks' headline figures."""
    shutil.rmtree(folder, ignore_errors=True)
    recipe = {
        "model": "reference",
        "steps": [] if step is None else [step],
        "export": {"tier": "plugin"},
        "eval": {"tasks": ["reference"], "baseline": False, "speed": False},
    }
    calibrated = step is not None and (step["op"] != "topk" or "allocation" in step)
    report = moe_compress.run(recipe | ({"calibration": CALIBRATION} if calibrated else {}), folder)
    figures = report["compressed"]
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["steps"]
    return {
        "name": name,
        "step": step,
        "plan": [line for entry in plan for line in entry["summary"]],
        "skipped": 1 - figures["experts_per_token_mean"] / 4,
        "expert_flops_per_token": figures["expert_flops_per_token"],
        "flops_per_token": figures["flops_per_token"],
        "tasks": {
            task.removeprefix("reference_"): next(iter(metrics.values()))["value"]
            for task, metrics in figures["tasks"].items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where checkpoints are made; a temporary one by default")
    parser.add_argument("--only", nargs="+", choices=ROWS, help="rows to make; all by default")
    given = parser.parse_args()
    made_with = settings()
    rows = kept_rows(made_with)
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, step in ROWS.items():
            if any(row["name"] == name for row in rows) or name not in (given.only or ROWS):
                continue
            rows.append(made(name, step, (given.folder or Path(scratch)) / "row"))
            rows.sort(key=lambda row: list(ROWS).index(row["name"]))
            RESULTS.write_text(json.dumps(made_with | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
            print(name, f"{rows[-1]['skipped']:.3f}", rows[-1]["tasks"], flush=True)


if __name__ == "__main__":
    main()
