"""4-bit GPTQ of a Mixture-of-Experts by `moe-compress run` and by llm-compressor, on the same machine in turn.

    python -m benchmarks.gptq_speed [--folder DIR] [--threads N] [--ours RUNS] [--theirs RUNS]

Both quantize the checkpoint of `moe_50m` to W4A16 (4 bits, symmetric, groups of 128, routed experts and attention) on
the same 32 x 512 calibration tokens, each run in a fresh process: time of the quantize step and of the whole command,
processor time, peak memory of the process tree, and of the process by the end of the step. Then one process loads the
original and both results with plain transformers, computes in float32, and gives their perplexity on held-out text and
the error of their layers' outputs. `gptq_floor` says what the multiplications alone would take.

DIR keeps the checkpoint and llm-compressor's virtual environment, which is made with pip: torch is pinned to a version
that it has a build without CUDA of, and pip is asked what it would install before it does. Results go to
`benchmarks/results/gptq_speed.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoTokenizer

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gptq_floor, gptq_quality, moe_50m
from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.data import load_calibration
from moe_compress.manifest import hardware, library_versions

RESULTS = Path(__file__).parent / "results"
REQUIREMENTS = ["llmcompressor==0.14.*", "torch==2.13.0"]
POLL_SECONDS = 0.2  # looking at all processes costs processor time itself
TARGETS = {"quantize_ratio": 20, "perplexity_ratio": 1.0, "peak_rss_ratio": 1.0}
CALIBRATION = {"dataset": "reference", "num_samples": 32, "sequence_length": moe_50m.SEQUENCE_LENGTH, "batch_size": 8}
NUM_LAYERS = moe_50m.SHAPE["num_hidden_layers"]
STEP = {"op": "quantize", "method": "gptq", "bits": 4, "group_size": 128, "attention": {}}


def environment(folder: Path) -> Path:
    """The Python of llm-compressor's virtual environment, made if it is not there."""
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", *REQUIREMENTS]
    planned = subprocess.run([*install, "--dry-run"], check=True, stdout=subprocess.PIPE, text=True).stdout
    wanted = planned[planned.find("Would install") :]
    if re.search(r"\b(nvidia-cu|nvidia-nccl|cuda-toolkit|triton-)", wanted):
        raise SystemExit(f"pip would install a torch with CUDA; offer it a CPU build of torch 2.13.0 first:\n{wanted}")
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    (folder / "complete").touch()
    return python


def watched(command: list[str], threads: int) -> dict[str, Any]:
    """Run a command; wall and processor seconds, peak resident bytes of its processes together, and its output."""
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    load, started, used = os.getloadavg()[0], time.monotonic(), children_seconds()
    process = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    root, peak = psutil.Process(process.pid), 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):  # one of them ended between the list and the look
                members = (root, *root.children(recursive=True))
                peak = max(peak, sum(member.memory_info().rss for member in members))
            time.sleep(POLL_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(children_seconds() - used, 1),
        "peak_rss_bytes": peak,
        "load_before": round(load, 1),  # processes that wanted to run, mean of a minute
        "output": output,
    }


def children_seconds() -> float:
    """Processor time of all processes started here that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def last_json(run: dict[str, Any]) -> dict[str, Any]:
    """A run's figures with those it printed in its last line."""
    return run | json.loads(run.pop("output").strip().splitlines()[-1])


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """How many times as much llm-compressor takes, medians of all runs; memory the other way round."""

    def median(side: str, figure: str) -> float:
        return statistics.median(run[figure] for run in runs[side])

    figures = {
        "quantize_ratio": "quantize_seconds",
        "quantize_processor_ratio": "quantize_processor_seconds",
        "command_ratio": "seconds",
        "command_processor_ratio": "processor_seconds",
    }
    ratios = {name: round(median("theirs", f) / median("ours", f), 1) for name, f in figures.items()}
    for figure in ("peak_rss", "quantize_peak_rss"):
        memory = median("ours", f"{figure}_bytes") / median("theirs", f"{figure}_bytes")
        ratios[f"{figure}_ratio"] = round(memory, 2)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("gptq-benchmark"), help="kept between calls")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours", type=int, default=3, help="runs of moe-compress")
    parser.add_argument("--theirs", type=int, default=1, help="runs of llm-compressor, each of which takes minutes")
    parser.add_argument("--layers", type=int, default=NUM_LAYERS, help="fewer for a trial")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    python = environment(folder / "llm-compressor")
    layers = arguments.layers
    source = folder / ("moe-50m" if layers == NUM_LAYERS else f"moe-50m-{layers}-layers")
    moe_50m.make(source, arguments.threads, layers)
    tokenizer = AutoTokenizer.from_pretrained(source)
    recipe = {"model": str(source), "calibration": CALIBRATION, "steps": [STEP], "eval": {"tasks": [], "speed": False}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    tokens = load_calibration(CalibrationConfig(**CALIBRATION), tokenizer, max_length=None).tokens
    save_file({"tokens": tokens}, folder / "tokens.safetensors")

    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        results = {side: Path(name) / side for side in runs}
        scripts = {
            "ours": [sys.executable, "-m", "benchmarks.gptq_ours", str(folder / "recipe.yaml")],
            "theirs": [str(python), str(Path(__file__).with_name("gptq_theirs.py")), str(source),
                       str(folder / "tokens.safetensors")],
        }  # fmt: skip
        wanted = {"ours": arguments.ours, "theirs": arguments.theirs}
        for number in range(max(wanted.values())):
            for side in (side for side in runs if number < wanted[side]):
                shutil.rmtree(results[side], ignore_errors=True)
                runs[side].append(last_json(watched([*scripts[side], str(results[side])], arguments.threads)))
                print(side, json.dumps(runs[side][-1]), flush=True)
        torch.set_num_threads(arguments.threads)
        quality = gptq_quality.measure({"original": source} | results, moe_50m.heldout(tokenizer))
        least = gptq_floor.floor(moe_50m.SHAPE | {"num_hidden_layers": layers}, tokens.numel(), tokens.shape[1])
        sizes = {side: sum(f.stat().st_size for f in path.glob("*.safetensors")) for side, path in results.items()}
    ratios = compare(runs)
    ratios["perplexity_ratio"] = round(quality["ours"]["perplexity"] / quality["theirs"]["perplexity"], 5)
    result = {
        "model": {"shape": moe_50m.SHAPE | {"num_hidden_layers": layers}, "training": moe_50m.TRAINING},
        "recipe": recipe | {"model": source.name},
        "threads": arguments.threads,
        "runs": runs,
        "ratios": ratios,
        "targets": TARGETS,
        "floor": least,
        "quality": quality,
        "stored_bytes": sizes,
        "hardware": hardware("cpu"),
        "versions": library_versions(),
    }
    name = "gptq_speed.json" if layers == NUM_LAYERS else f"gptq_speed-{layers}-layers.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"ratios": ratios, "quality": quality, "floor": least}, indent=1))


if __name__ == "__main__":
    main()
