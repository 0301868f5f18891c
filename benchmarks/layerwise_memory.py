"""Memory of healing a checkpoint larger than memory, layer by layer, with its experts trained.

    python -m benchmarks.layerwise_memory [--folder DIR] [--layers N]

Writes a random bf16 checkpoint of OLMoE-1B-7B's shape (about 13.8 GB), drops half of its experts by REAP, and heals
what is left by `mode: layerwise`: routers, norms and experts, on a few tokens; verification included. Peak memory is
the largest resident set of any process of the run, sampled. Needs about 45 GB of disk.

Results go to `benchmarks/results/layerwise_memory.json`. The weights mean nothing, so nothing is said of quality.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.olmoe_shape import CONFIG, write
from benchmarks.streaming import RESULTS, measure
from moe_compress.manifest import hardware, library_versions

TARGET = 6e9  # bytes
STEPS: list[dict[str, Any]] = [
    {"op": "prune", "criterion": "reap", "keep": 0.5},
    {"op": "distill", "mode": "layerwise", "trainable": ["routers", "norms", "experts"], "batch_size": 2},
]
CALIBRATION = {"num_samples": 4, "sequence_length": 64, "min_tokens_per_expert": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("layerwise-benchmark"))
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    arguments = parser.parse_args()
    source, out = arguments.folder / "olmoe-shape", arguments.folder / "out"
    write(source, arguments.layers)
    text, recipe = arguments.folder / "calibration.txt", arguments.folder / "recipe.yaml"
    text.write_text(Path(os.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    settings = {"calibration": CALIBRATION | {"dataset": str(text)}, "steps": STEPS}
    settings |= {"eval": {"tasks": [], "speed": False}}
    recipe.write_text(yaml.safe_dump({"model": str(source)} | settings), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "moe_compress", "run", str(recipe), str(out)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = measure(command, environment | {"HF_HUB_OFFLINE": "1"})
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))["steps"][1]
    result = {
        "checkpoint_bytes": sum(file.stat().st_size for file in source.iterdir()),
        "layers": arguments.layers,
        "steps": STEPS,
        "calibration": CALIBRATION,
        "run": found,
        "errors": [[round(line[key], 5) for key in ("before", "loss")] for line in plan["curve"]],
        "peak_rss_bytes": max(found["peak_rss_bytes"], found["peak_rss_bytes_children"]),
        "target": TARGET,
        "hardware": hardware("cpu"),
        "versions": library_versions(),
    }
    shutil.rmtree(out)
    whole = arguments.layers == CONFIG["num_hidden_layers"]
    name = "layerwise_memory.json" if whole else f"layerwise_memory-{arguments.layers}-layers.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"peak RSS {result['peak_rss_bytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
