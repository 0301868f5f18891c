"""What `moe-compress plan` predicts against what the run then takes: stored bytes, peak memory, time.

    python -m benchmarks.plan_accuracy [--folder DIR] [--threads 1]

Three recipes (`prune-reap-25`, `w4-stock`, `mc-2.5bit`) on the built-in model, where the program itself is most of the
memory, and on a random model of several hundred megabytes (`wide`), where it is not. Predictions are made from a folder
that holds the model's config.json alone. Peak memory is the largest resident set of the run's own process, and of the
processes it starts, sampled; evaluation is left out. Results go to `benchmarks/results/plan_accuracy.json`.

Time is predicted from what the machine does in two seconds before the run; on a shared machine that is not what it does
later, so the ratio is recorded and nothing is claimed of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import moe_compress
from benchmarks.streaming import measure
from moe_compress.checkpoint.source import REFERENCE
from moe_compress.manifest import hardware, library_versions

RESULTS = Path(__file__).parent / "results" / "plan_accuracy.json"
RECIPES = {"prune": "prune-reap-25", "w4-stock": "w4-stock", "mc-2.5bit": "mc-2.5bit"}
WIDE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts": 48,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MODELS: dict[str, list[str]] = {
    "reference": [],
    "wide": ["calibration.num_samples=32", "calibration.batch_size=4", "calibration.min_tokens_per_expert=0"],
}
COMMON = ["eval.speed=false"]


def make_wide(folder: Path) -> None:
    """Write the random model, unless it is there."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    part = folder.with_name(f"{folder.name}.part")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**WIDE)).bfloat16().save_pretrained(part, max_shard_size="200MB")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(part)
    part.rename(folder)


def predicted(recipe: str, model: Path, folder: Path, overrides: list[str], environment: dict[str, str]) -> Any:
    """The plan, made in a fresh process from a folder with nothing but config.json."""
    bare = folder / f"{model.name}-config"
    bare.mkdir(exist_ok=True)
    shutil.copyfile(model / "config.json", bare / "config.json")
    line = [sys.executable, "-m", "moe_compress", "plan", recipe, f"model={bare}", *overrides, "--hours", "--json"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def compare(
    recipe: str, model: Path, folder: Path, overrides: list[str], environment: dict[str, str]
) -> dict[str, Any]:
    """One recipe on one model: the plan, then the run, and the ratios of the two."""
    planned = predicted(recipe, model, folder, overrides, environment)
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    line = [sys.executable, "-m", "moe_compress", "run", recipe, str(out), f"model={model}", *overrides]
    took = measure(line, environment)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    pairs = {
        "stored_bytes": (planned["predicted"]["stored_bytes"], report["compressed"]["stored_bytes"]),
        "peak_process_bytes": (planned["memory"]["process"], took["peak_rss_bytes"]),
        "peak_host_bytes": (planned["memory"]["host"], took["peak_rss_bytes_together"]),
        "seconds": (round(planned["time"]["seconds"], 1), took["seconds"]),
    }
    figures = {
        name: {"predicted": guess, "measured": found, "ratio": round(guess / found, 4)}
        for name, (guess, found) in pairs.items()
    }
    return figures | {"peak_stage": planned["memory"]["process_stage"], "stages": took.get("stages", {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("plan-accuracy-benchmark"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[f"{model}/{name}" for model in MODELS for name in RECIPES])
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    make_wide(folder / "wide")
    # As a user's process has it: the allocator is not told to keep what was freed.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    root = str(Path(moe_compress.__file__).parents[1])
    environment |= {"OMP_NUM_THREADS": str(arguments.threads), "PYTHONPATH": root}
    results = json.loads(RESULTS.read_text(encoding="utf-8"))["results"] if RESULTS.exists() else {}
    for model, settings in MODELS.items():
        place = REFERENCE if model == "reference" else folder / model
        for name, recipe in RECIPES.items():
            if f"{model}/{name}" in arguments.only:
                found = compare(recipe, place, folder, [*settings, *COMMON], environment)
                results.setdefault(model, {})[name] = found
                print(model, name, json.dumps(found, indent=1), flush=True)
    content = {
        "settings": {"models": MODELS, "recipes": RECIPES, "wide": WIDE, "threads": arguments.threads},
        "results": results,
        "hardware": hardware("cpu"),
        "versions": library_versions(),
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
