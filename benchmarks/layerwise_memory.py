"""Memory of training a checkpoint larger than memory layer by layer.

    python -m benchmarks.layerwise_memory [--folder DIR] [--layers N] [--only healing|skipping]

Writes a random bf16 checkpoint of OLMoE-1B-7B's shape (about 13.8 GB), and trains what becomes of it by `mode:
layerwise` on a few tokens, verification included. Peak memory is the largest resident set of any process of the run,
sampled. Needs about 45 GB of disk.

* healing: half of the experts are dropped by REAP; routers, norms and experts are trained.
* skipping: as many zero experts as experts; routers are trained to skip half of the slots.

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
LAYERWISE: dict[str, Any] = {"op": "distill", "mode": "layerwise", "batch_size": 2}
STEPS: dict[str, list[dict[str, Any]]] = {
    "healing": [
        {"op": "prune", "criterion": "reap", "keep": 0.5},
        LAYERWISE | {"trainable": ["routers", "norms", "experts"]},
    ],
    "skipping": [{"op": "zero_experts", "count": 1.0}, LAYERWISE | {"trainable": ["routers"], "target_skip": 0.5}],
}
CALIBRATION = {"num_samples": 4, "sequence_length": 64, "min_tokens_per_expert": 0}


def peaks(name: str, source: Path, folder: Path) -> dict[str, Any]:
    """What one case took."""
    text, recipe, out = folder / "calibration.txt", folder / "recipe.yaml", folder / "out"
    text.write_text(Path(os.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    settings = {"calibration": CALIBRATION | {"dataset": str(text)}, "steps": STEPS[name]}
    settings |= {"export": {"tier": "plugin" if name == "skipping" else "stock"}, "eval": {"tasks": [], "speed": False}}
    recipe.write_text(yaml.safe_dump({"model": str(source)} | settings), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "moe_compress", "run", str(recipe), str(out)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = measure(command, environment | {"HF_HUB_OFFLINE": "1"})
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))["steps"][1]
    shutil.rmtree(out)
    return {
        "steps": STEPS[name],
        "run": found,
        "errors": [[round(line[key], 5) for key in ("before", "loss")] for line in plan["curve"]],
        "peak_rss_bytes": max(found["peak_rss_bytes"], found["peak_rss_bytes_children"]),
        "hardware": hardware("cpu"),
        "versions": library_versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("layerwise-benchmark"))
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--only", choices=STEPS, help="one case; the other's results are kept")
    arguments = parser.parse_args()
    source = arguments.folder / "olmoe-shape"
    write(source, arguments.layers)
    whole = arguments.layers == CONFIG["num_hidden_layers"]
    file = RESULTS / f"layerwise_memory{'' if whole else f'-{arguments.layers}-layers'}.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["cases"] if file.exists() else {}
    for name in STEPS if arguments.only is None else [arguments.only]:
        kept[name] = peaks(name, source, arguments.folder)
        result = {
            "checkpoint_bytes": sum(part.stat().st_size for part in source.iterdir()),
            "layers": arguments.layers,
            "calibration": CALIBRATION,
            "target": TARGET,
            "cases": kept,
        }
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: peak RSS {kept[name]['peak_rss_bytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
