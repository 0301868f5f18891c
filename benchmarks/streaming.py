"""Memory, time and disk traffic of streaming a checkpoint larger than we want to hold in memory.

    python -m benchmarks.streaming [--folder DIR] [--layers N]

Writes a random bf16 checkpoint of OLMoE-1B-7B's shape (about 13.8 GB), then runs `identity` (every layer loaded, run,
written) and `prune` to 75 % (2,048 calibration tokens) on it, verification included, and `cp -r` of the same folder.
Peak memory is the largest resident set of any process of the run, sampled; the files are dropped from the page cache
before each run where the system lets us. Results go to `benchmarks/results/streaming.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.olmoe_shape import CONFIG, write
from moe_compress.manifest import hardware, library_versions

RESULTS = Path(__file__).parent / "results"


def watch(process: psutil.Process, peaks: dict[str, int], stop: threading.Event) -> None:
    """Keep the largest resident set of the process itself, of any of its children, and of all of them together."""
    while not stop.wait(0.02):
        together = 0
        for who, members in (("main", lambda: [process]), ("children", lambda: process.children(recursive=True))):
            try:
                for member in members():
                    resident = member.memory_info().rss
                    together += resident
                    peaks[who] = max(peaks[who], resident)
            except psutil.NoSuchProcess:
                pass
        peaks["together"] = max(peaks["together"], together)


def measure(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command; wall seconds, peak resident bytes, bytes read and written."""
    drop_caches()
    before = psutil.disk_io_counters()
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peaks = {"main": 0, "children": 0, "together": 0}
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(psutil.Process(process.pid), peaks, stop))
    watcher.start()
    output, _ = process.communicate()
    stop.set()
    watcher.join()
    seconds = time.monotonic() - started
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    stages = dict(re.findall(r"^\[(?:step \S+ )?([^\]]+)\] .*done in (\S+ \S+)$", output, re.MULTILINE))
    after = psutil.disk_io_counters()
    result = {
        "seconds": round(seconds, 1),
        "peak_rss_bytes": peaks["main"],
        "peak_rss_bytes_children": peaks["children"],
        "peak_rss_bytes_together": peaks["together"],
    }
    if stages:
        result["stages"] = stages
    if before is not None and after is not None:
        result |= {
            "disk_read": after.read_bytes - before.read_bytes,
            "disk_written": after.write_bytes - before.write_bytes,
        }
    return result


def seconds_of(runs: list[dict[str, Any]]) -> float:
    """Median seconds that the layers themselves took: read, convert, run, hash, write."""
    shown = sorted(
        float(run["stages"]["identity"].split()[0]) * (60 if "min" in run["stages"]["identity"] else 1) for run in runs
    )
    return shown[len(shown) // 2]


def drop_caches() -> None:
    """Forget cached files, so that every contender reads from the disk; needs root."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1", encoding="utf-8")
    except OSError:
        print("page cache not dropped (needs root): times are with warm files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("streaming-benchmark"))
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--repeats", type=int, default=1, help="runs of cp and identity, in turn; medians are reported")
    arguments = parser.parse_args()
    source, out = arguments.folder / "olmoe-shape", arguments.folder / "out"
    write(source, arguments.layers)
    text = arguments.folder / "calibration.txt"
    text.write_text(Path(os.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    base = {"model": str(source), "calibration": {"dataset": str(text), "num_samples": 4, "sequence_length": 512,
                            "min_tokens_per_expert": 0},
            "eval": {"tasks": [], "speed": False}}  # fmt: skip
    steps = {"identity": [], "prune_75": [{"op": "prune", "criterion": "reap", "keep": 0.75}]}
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    runs: dict[str, list[dict[str, Any]]] = {"cp": [], "identity": [], "prune_75": []}
    for repeat in range(arguments.repeats):
        for name in runs:
            if name == "prune_75" and repeat:
                continue
            shutil.rmtree(out, ignore_errors=True)
            if name == "cp":
                command = ["cp", "-r", str(source), str(out)]
            else:
                recipe = arguments.folder / f"{name}.yaml"
                recipe.write_text(yaml.safe_dump(base | {"steps": steps[name]}), encoding="utf-8")
                if name == "identity":
                    recipe.write_text(
                        yaml.safe_dump({k: v for k, v in base.items() if k != "calibration"} | {"steps": []}),
                        encoding="utf-8",
                    )
                command = [sys.executable, "-m", "moe_compress", "run", str(recipe), str(out)]
            runs[name].append(measure(command, environment))
            print(name, runs[name][-1], flush=True)
    shutil.rmtree(out, ignore_errors=True)
    median = {name: sorted(run["seconds"] for run in found)[len(found) // 2] for name, found in runs.items()}
    peak = max(
        max(run["peak_rss_bytes"], run["peak_rss_bytes_children"])
        for name in ("identity", "prune_75")
        for run in runs[name]
    )
    result = {
        "checkpoint_bytes": sum(file.stat().st_size for file in source.iterdir()),
        "layers": arguments.layers,
        "runs": runs,
        "identity_over_cp": round(median["identity"] / median["cp"], 2),
        "identity_without_start_and_verification_over_cp": round(seconds_of(runs["identity"]) / median["cp"], 2),
        "peak_rss_bytes": peak,
        "targets": {"peak_rss_bytes": 3.5e9, "identity_over_cp": 3.0},
        "hardware": hardware("cpu"),
        "versions": library_versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    name = (
        "streaming.json"
        if arguments.layers == CONFIG["num_hidden_layers"]
        else f"streaming-{arguments.layers}-layers.json"
    )
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"identity / cp: {result['identity_over_cp']}, peak RSS {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
