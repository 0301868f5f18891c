"""Runs killed with `kill -9` at random moments and resumed: is every file of every result the same, bit for bit?

    python -m benchmarks.kill_resume [--kills N] [--seed S] [--folder DIR]

An uninterrupted run of the built-in model (prune to 75 % by REAP) gives the reference result and its length. The length
is cut into as many parts as there are kills, and each kill falls at a seeded random moment of its part. Moments count
the run's own processor time, so that a busy machine does not push all kills into the first imports. Results go to
`benchmarks/results/kill_resume.json`; the exit code is 1 when any file differed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from moe_compress.manifest import hardware, library_versions

RESULTS = Path(__file__).parent / "results"
NUM_LAYERS = 8
POLL_SECONDS = 0.02
RECIPE = {
    "model": "reference",
    "calibration": {"dataset": "reference", "num_samples": 32, "sequence_length": 512},
    "steps": [{"op": "prune", "criterion": "reap", "keep": 0.75}],
    "eval": {"tasks": [], "speed": False},
}


def start(recipe: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """A run in a process of its own; what it says goes to a file beside OUT."""
    command = [sys.executable, "-m", "moe_compress", "run", str(recipe), str(out), "--device", "cpu", *options]
    with out.with_name(f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], out: Path) -> float:
    """Let a run end by itself and return its length; its last words end this program when it failed."""
    used = live(process)
    if process.returncode != 0:
        raise SystemExit(f"the run of {out} failed:\n{out.with_name(f'{out.name}.log').read_text()}")
    return used


def live(process: subprocess.Popen[bytes], until: float = math.inf) -> float:
    """Kill a run after so many seconds of processor time, unless it ends before; returns the seconds used."""
    watched, used = psutil.Process(process.pid), 0.0
    while process.poll() is None:
        used = max(used, processor_seconds(watched))
        if used >= until:
            process.kill()
            process.wait()
            break
        time.sleep(POLL_SECONDS)
    return used


def processor_seconds(process: psutil.Process) -> float:
    """Time on processors of a process and its children, those that ended included."""
    used = 0.0
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            used += times.user + times.system + times.children_user + times.children_system
    return used


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def done_so_far(out: Path) -> dict[str, Any]:
    """What a killed run had done: the stage it was in, and the layers that are on disk."""
    step = out.with_name(f"{out.name}.work") / "step-0"
    scored = NUM_LAYERS if (step / "scores" / "scores.json").exists() else len([*step.glob("scores/layer-*")])
    written = 0
    if (step / "checkpoint" / "ledger.json").exists():
        written = NUM_LAYERS
    elif (parts := step / "checkpoint" / "parts.json").exists():
        written = sum(part.startswith("layer-") for part in json.loads(parts.read_text()))
    if out.exists():
        stage = "clean up"
    elif (step / "checkpoint" / "manifest.json").exists():
        stage = "verify"
    elif (step / "plan.json").exists():
        stage = "apply"
    else:
        stage = "score" if (step / "scores").exists() else "start"
    return {"stage": stage, "layers_scored": scored, "layers_written": written}


def kill_and_resume(recipe: Path, out: Path, moment: float, expected: dict[str, str]) -> dict[str, Any]:
    """One run killed after `moment` seconds (earlier when it is over by then), resumed and compared."""
    while True:
        process = start(recipe, out)
        used = live(process, moment)
        if process.returncode == -signal.SIGKILL:
            break
        shutil.rmtree(out)
        moment *= 0.9
    found = {"killed_after_seconds": round(used, 2)} | done_so_far(out)
    found["resume_seconds"] = round(finish(start(recipe, out, "--resume"), out), 2)
    result = hashes(out)
    differing = sorted(name for name in expected.keys() | result if expected.get(name) != result.get(name))
    left = sorted(entry.name for entry in out.parent.glob(f"*{out.name}*") if entry != out and entry.suffix != ".log")
    shutil.rmtree(out)
    return found | {"identical": not differing and not left, "differing": differing, "left_behind": left}


def table(kills: list[dict[str, Any]]) -> str:
    """One line per kill."""
    rows = [("kill", "after", "stage", "scored", "written", "resume", "identical")]
    for number, kill in enumerate(kills, 1):
        layers = (f"{kill[name]}/{NUM_LAYERS}" for name in ("layers_scored", "layers_written"))
        outcome = "yes" if kill["identical"] else f"NO: {', '.join(kill['differing'] + kill['left_behind'])}"
        seconds = (f"{kill[name]:.1f} s" for name in ("killed_after_seconds", "resume_seconds"))
        rows.append((str(number), next(seconds), kill["stage"], *layers, next(seconds), outcome))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder unless given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-resume-", dir=arguments.folder) as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE))
        # The first run fills the page cache, the second one is measured.
        finish(start(recipe, folder / "first"), folder / "first")
        length = finish(start(recipe, folder / "uninterrupted"), folder / "uninterrupted")
        expected = hashes(folder / "uninterrupted")
        repeatable = expected == hashes(folder / "first")
        print(f"an uninterrupted run takes {length:.1f} s and makes {len(expected)} files", flush=True)
        rng = random.Random(arguments.seed)
        kills = []
        for number in range(arguments.kills):
            moment = (number + rng.random()) / arguments.kills * length
            kills.append(kill_and_resume(recipe, folder / f"run-{number:02d}", moment, expected))
            print(f"kill {number + 1}/{arguments.kills}: {json.dumps(kills[-1])}", flush=True)
    result = {
        "recipe": RECIPE,
        "seed": arguments.seed,
        "seconds": "processor time of a run and its children",
        "uninterrupted_seconds": round(length, 2),
        "two_uninterrupted_runs_identical": repeatable,
        "files": len(expected),
        "kills": kills,
        "all_identical": repeatable and all(kill["identical"] for kill in kills),
        "hardware": hardware("cpu"),
        "versions": library_versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kill_resume.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(kills)}\n\nall identical: {'yes' if result['all_identical'] else 'NO'}")
    if not result["all_identical"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
