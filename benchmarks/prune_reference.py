"""Every pruning criterion on the built-in model at keep 0.75, beside random prunings, for several calibration sets.

    python -m benchmarks.prune_reference [--folder DIR]

The packaged calibration texts are of five kinds: code, documentation and prose (running text), facts and reasoning
(skills). `mixture` takes them as they come, which is about 62 % running text; the other sets give running text a share
of the sequences. The model is scored once per set, every criterion is planned from these scores, and every plan is
evaluated on whole tables of the `reference` tasks. Random prunings know nothing of the text, so they are made once.

Results go to `benchmarks/results/prune_reference.json` after every row; rows that are already there are kept when
nothing that decides them has changed. Seconds are wall-clock. Not covered: other budgets, and other models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from transformers import AutoTokenizer

from moe_compress import __version__
from moe_compress.api import score
from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.data import load_calibration
from moe_compress.calibrate.documents import REFERENCE
from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.rewrite import open_rewritten
from moe_compress.checkpoint.source import Checkpoint, open_checkpoint
from moe_compress.compress.prune.config import CriterionName, PruneConfig
from moe_compress.compress.prune.step import PruneStep
from moe_compress.compress.surroundings import Surroundings
from moe_compress.eval.config import EvalConfig
from moe_compress.eval.harness import evaluate
from moe_compress.manifest import hardware, library_versions
from moe_compress.progress import SilentProgress

RESULTS = Path(__file__).parent / "results" / "prune_reference.json"
KEEP = 0.75
CRITERIA = [name for name in get_args(CriterionName) if name not in ("random", "ablation")]
SEEDS = range(5)
CALIBRATION = {"num_samples": 64, "sequence_length": 512}
BATCH_SIZE = 8
TEXT_KINDS = ("code", "documentation", "prose")
SETS: dict[str, tuple[float | None, list[str]]] = {  # share of running text, and the criteria to try
    "mixture": (None, CRITERIA),
    "text 70 %": (0.7, ["reap", "man"]),
    "text 80 %": (0.8, ["reap", "man"]),
    "text 90 %": (0.9, ["reap", "man"]),
    "text 100 %": (1.0, ["reap", "man"]),
}

Row = dict[str, Any]
Key = tuple[str | None, str, int | None]


def calibration_sets(folder: Path) -> dict[str, CalibrationConfig]:
    """The sets by name; `folder` receives the packaged texts as one file of running text and one of skills."""
    records = [json.loads(line) for line in REFERENCE.read_text(encoding="utf-8").splitlines()]
    for name, wanted in (("text", True), ("skills", False)):
        lines = [json.dumps(record) + "\n" for record in records if (record["kind"] in TEXT_KINDS) == wanted]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    given = CALIBRATION | {"batch_size": BATCH_SIZE}
    return {
        name: CalibrationConfig.model_validate(given | {"dataset": dataset(share, folder)})
        for name, (share, _) in SETS.items()
    }


def dataset(share: float | None, folder: Path) -> str | list[dict[str, Any]]:
    """What a recipe says for a share of running text."""
    text, skills = (str(folder / f"{name}.jsonl") for name in ("text", "skills"))
    if share is None:
        return "reference"
    return [{"dataset": text, "weight": share}, {"dataset": skills, "weight": 1 - share}] if share < 1 else text


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def settings(source: Checkpoint) -> dict[str, Any]:
    """What decides the figures besides the calibration set; the model is known by its bytes."""
    weights = b"".join(file.read_bytes() for file in sorted(source.folder.glob("*.safetensors")))
    return {
        "model": {"name": "reference", "weights_sha256": sha256(weights)},
        "keep": KEEP,
        "hardware": hardware("cpu"),
        "versions": {"moe_compress": __version__} | library_versions(),
    }


def fingerprints(source: Checkpoint, sets: dict[str, CalibrationConfig]) -> dict[str, Any]:
    """Each set's settings and the sha256 of its token ids."""
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    found = {}
    for name, config in sets.items():
        tokens = load_calibration(config, tokenizer, max_length=None).tokens.numpy().astype("<i8").tobytes()
        found[name] = CALIBRATION | {"text_share": SETS[name][0], "seed": config.seed, "tokens_sha256": sha256(tokens)}
    return found


def kept_rows(made_with: dict[str, Any], calibration: dict[str, Any]) -> list[Row]:
    """Rows of an earlier run that this one would make again."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if any(found.get(key) != value for key, value in made_with.items()):
        return []
    same = {name for name, described in calibration.items() if found["calibration"].get(name) == described}
    return [row for row in found["rows"] if row["calibration"] in {None, *same}]


def figures(folder: Path) -> dict[str, float]:
    """Headline figure of each task; every packaged task has one metric."""
    tasks = evaluate(folder, EvalConfig(tasks=["reference"]))["tasks"]
    return {task.removeprefix("reference_"): next(iter(metrics.values()))["value"] for task, metrics in tasks.items()}


def pruned(criterion: str, seed: int, scores: Scores, source: Checkpoint, folder: Path, rows: list[Row]) -> Row:
    """One pruning and its figures, which are those of an earlier row when the same experts stay."""
    config = PruneConfig.model_validate({"op": "prune", "criterion": criterion, "keep": KEEP, "seed": seed})
    step = PruneStep(config)
    plan = step.plan(scores, source.config)
    kept = sha256(json.dumps([layer.keep for layer in plan.layers]).encode())
    tasks = next((row["tasks"] for row in rows if row["kept_sha256"] == kept), None)
    if tasks is None:
        around = Surroundings(CalibrationConfig(dataset="reference"), 4 * 10**9, "cpu", SilentProgress())
        shutil.rmtree(folder, ignore_errors=True)
        step.apply(plan, source, folder, around, criterion, scores)
        tasks = figures(open_rewritten(folder, source).folder)
    return {"kept_sha256": kept, "tasks": tasks}


def key(row: Row) -> Key:
    return row["calibration"], row["criterion"], row["seed"]


def summary(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (n - 1) of the random prunings, per task."""
    drawn = [row["tasks"] for row in rows if row["criterion"] == "random"]
    values = {task: [tasks[task] for tasks in drawn] for task in drawn[0]} if len(drawn) > 1 else {}
    return {task: {"mean": statistics.mean(of), "sd": statistics.stdev(of)} for task, of in values.items()}


def table(rows: list[Row]) -> str:
    """One line per row, the mean of the random ones last."""
    lines = [["calibration", "criterion", *(task[:6] for task in rows[0]["tasks"])]]
    for row in rows:
        name = row["criterion"] if row["seed"] is None else f"{row['criterion']} {row['seed']}"
        lines.append([row["calibration"] or "", name, *(f"{value:.3f}" for value in row["tasks"].values())])
    for figure in ("mean", "sd"):
        lines.append(["", f"random {figure}", *(f"{of[figure]:.3f}" for of in summary(rows).values())])
    return "\n".join(f"{line[0]:<12}{line[1]:<13}" + "".join(f"{cell:>8}" for cell in line[2:]) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder unless given")
    arguments = parser.parse_args()
    source = open_checkpoint("reference")
    with tempfile.TemporaryDirectory(prefix="prune-reference-", dir=arguments.folder) as name:
        folder = Path(name)
        sets = calibration_sets(folder)
        wanted: list[Key] = [(None, "original", None)]
        wanted += [(None, "random", seed) for seed in SEEDS]
        wanted += [(name, criterion, None) for name, (_, criteria) in SETS.items() for criterion in criteria]
        made_with, described = settings(source), fingerprints(source, sets)
        rows = [row for row in kept_rows(made_with, described) if key(row) in wanted]
        done = {key(row) for row in rows}
        for calibration, criterion, seed in (one for one in wanted if one not in done):
            started = time.monotonic()
            row: Row = {"calibration": calibration, "criterion": criterion, "seed": seed}
            if criterion == "original":
                row |= {"kept_sha256": None, "tasks": figures(source.folder)}
            else:
                chosen = calibration or next(iter(sets))  # a random plan needs scores for their super experts only
                recipe = {"model": "reference", "calibration": sets[chosen].model_dump(exclude_unset=True)}
                scores = score(recipe, folder / chosen, device="cpu")
                row |= pruned(criterion, seed or 0, scores, source, folder / "pruned", rows)
            row["seconds"] = round(time.monotonic() - started, 1)
            rows = sorted([*rows, row], key=lambda row: wanted.index(key(row)))
            elapsed = round(sum(row["seconds"] for row in rows), 1)
            result = made_with | {"calibration": described, "random": summary(rows), "elapsed_seconds": elapsed}
            RESULTS.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
            print(f"row {len(rows)}/{len(wanted)}: {json.dumps(row)}", flush=True)
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
