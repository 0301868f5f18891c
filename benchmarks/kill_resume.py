"""Runs killed with `kill -9` at random moments and resumed: is every file of every result the same, bit for bit?

    python -m benchmarks.kill_resume [--kills N] [--seed S] [--folder DIR]

An uninterrupted run of the built-in model (prune to 75 % by REAP) gives the reference result. The kills take turns over
the stages: while layers are scored or written, one falls when a seeded random number of them is on disk; before and
after that, at a seeded random moment of the stage, which counts the run's own processor time, so that a busy machine
does not push all of them into the first imports. Kills are added until every stage was hit three times, or as often as
`--kills` allows. Results go to `benchmarks/results/kill_resume.json`, or to `--output`; the exit code is 1 when any
file differed or a stage was not hit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from moe_compress.manifest import hardware, library_versions

RESULTS = Path(__file__).parent / "results"
NUM_LAYERS = 8
POLL_SECONDS = 0.01
LAYERS = {"score": "layers_scored", "apply": "layers_written"}  # stages whose progress can be seen on disk
STAGES = ("start", "score", "apply", "verify")
ENOUGH = 3  # kills in every stage
RECIPE = {
    "model": "reference",
    "calibration": {"dataset": "reference", "num_samples": 32, "sequence_length": 512},
    "steps": [{"op": "prune", "criterion": "reap", "keep": 0.75}],
    "eval": {"tasks": [], "speed": False},
}


@dataclass(frozen=True)
class Aim:
    """When to kill: in `stage`, with so many layers on disk, or so many processor seconds after it began."""

    stage: str
    layers: int = 0
    seconds: float = 0.0

    def reached(self, state: dict[str, Any], seconds: float) -> bool:
        """Whether a run in this state, which is `seconds` in its stage, is where the kill should fall, or beyond."""
        if state["stage"] != self.stage:
            return self.stage in STAGES[: [*STAGES, "clean up"].index(state["stage"])]
        return state[LAYERS[self.stage]] >= self.layers if self.stage in LAYERS else seconds >= self.seconds


def aim(stage: str, lengths: dict[str, float], rng: random.Random) -> Aim:
    """A random moment of a stage; `lengths` has the seconds of those without layers."""
    if stage in LAYERS:
        return Aim(stage, layers=rng.randrange(NUM_LAYERS))
    return Aim(stage, seconds=rng.random() * lengths[stage])


def next_stage(kills: list[dict[str, Any]], wanted: int) -> str | None:
    """The stage of the next kill: in turn, then those not hit often enough; None when done or too often missed."""
    if len(kills) < wanted:
        return STAGES[len(kills) % len(STAGES)]
    hits = {stage: sum(kill["stage"] == stage for kill in kills) for stage in STAGES}
    least = min(hits, key=hits.__getitem__)
    enough = min(ENOUGH, wanted // len(STAGES))
    return least if hits[least] < enough and len(kills) < 2 * wanted else None


def start(recipe: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """A run in a process of its own; what it says goes to a file beside OUT."""
    command = [sys.executable, "-m", "moe_compress", "run", str(recipe), str(out), "--device", "cpu", *options]
    with out.with_name(f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], out: Path) -> float:
    """Let a run end by itself and return its length."""
    used, _ = live(process, out)
    require_success(process, out)
    return used


def require_success(process: subprocess.Popen[bytes], out: Path) -> None:
    """End this program with the last words of a run that failed."""
    if process.returncode != 0:
        raise SystemExit(f"the run of {out} failed:\n{out.with_name(f'{out.name}.log').read_text(encoding='utf-8')}")


def live(process: subprocess.Popen[bytes], out: Path, until: Aim | None = None) -> tuple[float, dict[str, float]]:
    """Watch a run, and kill it where `until` says; processor seconds used, and those at which each stage began."""
    watched, used = psutil.Process(process.pid), 0.0
    began: dict[str, float] = {}
    while process.poll() is None:
        state = done_so_far(out)
        if state["stage"] not in began or state["stage"] not in LAYERS:  # asking the system is slow
            used = max(used, processor_seconds(watched))
        began.setdefault(state["stage"], used)
        if until is not None and until.reached(state, used - began[state["stage"]]):
            used = max(used, processor_seconds(watched))
            process.kill()
            process.wait()
            break
        time.sleep(POLL_SECONDS)
    return used, began


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
    else:
        with contextlib.suppress(FileNotFoundError):
            parts = json.loads((step / "checkpoint" / "parts.json").read_text(encoding="utf-8"))
            written = sum(part.startswith("layer-") for part in parts)
    if out.exists():
        stage = "clean up"
    elif (step / "checkpoint" / "manifest.json").exists():
        stage = "verify"
    elif (step / "plan.json").exists():
        stage = "apply"
    else:
        stage = "score" if (step / "scores").exists() else "start"
    return {"stage": stage, "layers_scored": scored, "layers_written": written}


def kill_and_resume(recipe: Path, out: Path, until: Aim, expected: dict[str, str]) -> dict[str, Any]:
    """One run killed where `until` says (earlier when it is over by then), resumed and compared."""
    while True:
        process = start(recipe, out)
        used, _ = live(process, out, until)
        if process.returncode == -signal.SIGKILL:
            break
        shutil.rmtree(out)
        until = replace(until, seconds=until.seconds * 0.9)
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
    parser.add_argument("--output", type=Path, default=RESULTS / "kill_resume.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-resume-", dir=arguments.folder) as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
        # The first run fills the page cache, the second one is measured.
        finish(start(recipe, folder / "first"), folder / "first")
        process = start(recipe, folder / "uninterrupted")
        length, began = live(process, folder / "uninterrupted")
        require_success(process, folder / "uninterrupted")
        lengths = {"start": began["score"], "verify": length - began["verify"]}
        expected = hashes(folder / "uninterrupted")
        repeatable = expected == hashes(folder / "first")
        print(f"an uninterrupted run takes {length:.1f} s and makes {len(expected)} files", flush=True)
        rng = random.Random(arguments.seed)
        kills: list[dict[str, Any]] = []
        while (stage := next_stage(kills, arguments.kills)) is not None:
            until = aim(stage, lengths, rng)
            kills.append(kill_and_resume(recipe, folder / f"run-{len(kills):02d}", until, expected))
            print(f"kill {len(kills)}/{arguments.kills}: {json.dumps(kills[-1])}", flush=True)
    hits = {stage: sum(kill["stage"] == stage for kill in kills) for stage in STAGES}
    result = {
        "recipe": RECIPE,
        "seed": arguments.seed,
        "seconds": "processor time of a run and its children",
        "uninterrupted_seconds": round(length, 2),
        "two_uninterrupted_runs_identical": repeatable,
        "files": len(expected),
        "kills_by_stage": hits,
        "kills": kills,
        "all_identical": repeatable and all(kill["identical"] for kill in kills),
        "hardware": hardware("cpu"),
        "versions": library_versions(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(kills)}\n\nall identical: {'yes' if result['all_identical'] else 'NO'}")
    if not result["all_identical"] or min(hits.values()) < min(ENOUGH, arguments.kills // len(STAGES)):
        sys.exit(1)


if __name__ == "__main__":
    main()
