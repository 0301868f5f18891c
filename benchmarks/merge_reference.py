"""Merging on the built-in model: 16 experts per layer to 12 and 8, and differences at the bytes of 8.

    python -m benchmarks.merge_reference [--folder DIR] [--only TEXT]

Every grouping with and without alignment, with reduced and with kept routers, beside REAP and random prunings to as
many experts; then members kept as low-rank differences in as many bytes as half the experts take. Calibrated on 64
sequences of 512 tokens, four of running text to one of skills; `more text` on 256 of the packaged mixture as it comes,
which is 38 % skills. Every row is one step of a recipe, judged on whole tables of the `reference` tasks. A row has the
stored bytes of the checkpoint and of its routed experts.

Results go to `benchmarks/results/merge_reference.json` after every row; rows that are there are kept, so the script may
be stopped and started again. Seconds are wall-clock. Not covered: other models.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from benchmarks.prune_reference import calibration_sets, figures, sha256
from moe_compress import __version__
from moe_compress.checkpoint.rewrite import open_rewritten
from moe_compress.checkpoint.source import Checkpoint, open_checkpoint
from moe_compress.eval.cost import cost
from moe_compress.manifest import hardware, library_versions
from moe_compress.preparation import surroundings
from moe_compress.recipe import load_recipe
from moe_compress.steps import make_step

RESULTS = Path(__file__).parent / "results" / "merge_reference.json"
SET = "text 80 %"
GROUPINGS = ("hc", "router", "ream")
HALF = {"expert_bytes": 0.5}
MORE = "more text"
MORE_CALIBRATION = {"dataset": "reference", "num_samples": 256, "sequence_length": 512, "batch_size": 8}

Row = dict[str, Any]
Maker = Callable[[str, Row, Path, Row], Row]


def steps() -> dict[str, Row]:
    """Name -> the step of a row."""
    found: dict[str, Row] = {}
    for keep in (12, 8):
        prune = {"op": "prune", "keep": keep}
        found[f"{keep}: prune reap"] = prune | {"criterion": "reap"}
        found |= {f"{keep}: prune random {seed}": prune | {"criterion": "random", "seed": seed} for seed in range(3)}
        for grouping in GROUPINGS:
            merge = {"op": "merge", "keep": keep, "grouping": grouping}
            for align in (False, "weights", "activations"):
                found[f"{keep}: merge {grouping}, align {align or 'no'}"] = merge | {"align": align}
            kept = merge | {"router": "keep"}
            found[f"{keep}: merge {grouping}, align no, router kept"] = kept | {"align": False}
            found[f"{keep}: merge {grouping}, align weights, router kept"] = kept
    for keep in (1, 2, 4):
        step = {"op": "merge", "grouping": "router", "keep": keep, "keep_differences": HALF}
        found[f"8: differences from {keep}"] = step | ({"protect_super_experts": False} if keep == 1 else {})
    found["8: differences from 2, align no"] = found["8: differences from 2"] | {"align": False}
    again = ["8: prune reap", "8: merge ream, align weights", "8: differences from 2", "8: differences from 4"]
    return found | {f"{name}, {MORE}": found[name] for name in again}


def make(name: str, step: Row, folder: Path, calibration: Row) -> Row:
    """One row, calibrated on more tokens where its name says so."""
    if name.endswith(MORE):
        folder, calibration = folder / "more", MORE_CALIBRATION
        folder.mkdir(exist_ok=True)
    return run(name, step, folder, calibration)


def run(name: str, step: Row, folder: Path, calibration: dict[str, Any]) -> Row:
    """One row's bytes and figures."""
    started = time.monotonic()
    settings = {"model": "reference", "calibration": calibration, "steps": [step], "export": {"tier": "plugin"}}
    recipe = load_recipe(settings)
    source = open_checkpoint("reference")
    work = folder / "step"
    shutil.rmtree(work, ignore_errors=True)
    around, found = surroundings(recipe, "cpu", None), make_step(recipe.steps[0])
    scores = folder / f"scores-{sha256(json.dumps(found.score_settings(), sort_keys=True).encode())[:12]}"
    found.score(source, scores, around, "score")
    shutil.copytree(scores, work / "scores")
    found.run(source, work, around, name)
    return finished(name, step, open_rewritten(work / "checkpoint", source), started)


def finished(name: str, step: Row, written: Checkpoint, started: float) -> Row:
    """The row of a checkpoint that is there."""
    found = {"name": name, "step": step, **sizes(written), "tasks": figures(written.folder)}
    return found | {"seconds": round(time.monotonic() - started, 1)}


def sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes on disk, of all and of the routed experts, bytes of all tensors once loaded, and parameters."""
    experts = sum(info.nbytes for tensor, info in checkpoint.index.items() if ".experts." in tensor)
    found = cost(checkpoint.config)
    return {
        "stored_bytes": checkpoint.index.nbytes,
        "expert_bytes": experts,
        "resident_bytes": resident_bytes(checkpoint.folder),
        "total_params": found.total_params,
        "expert_flops_per_token": round(found.expert_flops_per_token),
    }


def resident_bytes(folder: Path) -> int:
    """Bytes of the loaded model's tensors, those at one address counted once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def table(rows: list[Row]) -> str:
    """One line per row: share of the experts' bytes, then the tasks."""
    lines = [["", "experts", *(task[:6] for task in rows[0]["tasks"])]]
    whole = max(row["expert_bytes"] for row in rows)
    for row in rows:
        share = f"{row['expert_bytes'] / whole:.1%}"
        lines.append([row["name"], share, *(f"{value:.3f}" for value in row["tasks"].values())])
    return "\n".join(f"{line[0]:<45}" + "".join(f"{cell:>8}" for cell in line[1:]) for line in lines)


def arguments_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder unless given")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    return parser


def main(
    results: Path,
    wanted: dict[str, Row],
    arguments: argparse.Namespace,
    described: Row,
    calibrations: Callable[[Path], Row],
    make: Maker = run,
) -> None:
    """Make the rows that `results` does not hold yet, by `make`.

    `described` says what is calibrated on; `calibrations` is given the folder to work in.
    """
    made_with = {"hardware": hardware("cpu"), "versions": {"moe_compress": __version__} | library_versions()}
    kept: list[Row] = json.loads(results.read_text(encoding="utf-8"))["rows"] if results.exists() else []
    rows = [row for row in kept if row["name"] == "original" or wanted.get(row["name"]) == row["step"]]
    with tempfile.TemporaryDirectory(prefix=f"{results.stem}-", dir=arguments.folder) as name:
        folder = Path(name)
        calibration = calibrations(folder)
        for title in ["original", *wanted]:
            if arguments.only not in title or any(row["name"] == title for row in rows):
                continue
            if title == "original":
                source = open_checkpoint("reference")
                row = {"name": title, "step": None, **sizes(source), "tasks": figures(source.folder)}
            else:
                row = make(title, wanted[title], folder, calibration)
            order = ["original", *wanted]
            rows = sorted([*rows, row], key=lambda row: order.index(row["name"]))
            content = made_with | {"calibration": described, "rows": rows}
            results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(row), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main(
        RESULTS,
        steps(),
        arguments_parser(__doc__).parse_args(),
        {"set": SET, "num_samples": 64, "sequence_length": 512, MORE: MORE_CALIBRATION},
        lambda folder: calibration_sets(folder)[SET].model_dump(exclude_unset=True),
        make,
    )
