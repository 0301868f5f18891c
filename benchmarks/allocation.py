"""How long does it take to choose the bits of every projection of a large model, and is the choice proven best?

    python -m benchmarks.allocation [--repeats N] [--seed S]

48 layers of 128 experts with three projections, five bit-widths each (18,432 items, 92,160 options), losses that fall
with the bits and spread over experts as routing does. Every problem is modelled and solved from its items, `repeats`
times, the medians counted. Results go to `benchmarks/results/allocation.json`; the exit code is 1 when the average-bits
problem took 20 s or more, or was not proven.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from moe_compress.compress.allocate import Budget, Item, Option, Rules, solve
from moe_compress.manifest import hardware, library_versions

RESULTS = Path(__file__).parent / "results"
LAYERS, EXPERTS, PROJECTIONS = 48, 128, 3
BITS = (1, 2, 3, 4, 8)
NUM_WEIGHTS = 2048 * 768
OVERHEAD_BITS = 0.25  # a scale and a zero point for every 128 weights
TARGET_SECONDS = 20.0


def build(seed: int) -> list[Item]:
    """The items of a model of Qwen3-30B-A3B's shape."""
    rng = np.random.default_rng(seed)
    items = []
    for layer in range(LAYERS):
        for expert, usage in enumerate(rng.lognormal(0.0, 1.0, EXPERTS) / EXPERTS * 8):
            for projection in range(PROJECTIONS):
                weight = usage * rng.lognormal(0.0, 0.3)
                options = []
                for bits, noise in zip(BITS, rng.lognormal(0.0, 0.2, len(BITS)), strict=True):
                    stored = int((bits + OVERHEAD_BITS) * NUM_WEIGHTS / 8)
                    options.append(
                        Option(str(bits), bits, stored, float(stored * usage), float(weight * 4.0**-bits * noise))
                    )
                name = f"layers.{layer}.experts.{expert}.{projection}"
                items.append(Item(name, layer, NUM_WEIGHTS, tuple(options), expert))
    return items


def problems(items: list[Item]) -> dict[str, tuple[Budget, Rules]]:
    """What is solved: each kind of budget, and PMQ's minimum counts."""
    stored = int(sum(option.stored_bytes for item in items for option in item.options if option.name == "3") * 0.8137)
    active = sum(option.active_bytes for item in items for option in item.options if option.name == "3") * 0.7137
    return {
        "average_bits": (Budget(average_bits=2.537), Rules()),
        "stored_bytes": (Budget(stored_bytes=stored), Rules()),
        "active_bytes": (Budget(active_bytes=active), Rules()),
        "average_bits, at least one at 3 and one at 2": (
            Budget(average_bits=2.537),
            Rules(minimum_counts={"3": 1, "2": 1}),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    items = build(arguments.seed)
    found: dict[str, dict[str, Any]] = {}
    for name, (budget, rules) in problems(items).items():
        seconds = []
        for _ in range(arguments.repeats):
            started = time.perf_counter()
            allocation = solve(items, budget, rules)
            seconds.append(round(time.perf_counter() - started, 2))
        found[name] = {
            "budget": budget.limits(),
            "seconds": seconds,
            "median_seconds": statistics.median(seconds),
            "optimal": allocation.optimal,
            "gap": allocation.gap,
            "loss": allocation.loss,
            "relaxation_bound": allocation.relaxation_bound,
            "average_bits": allocation.average_bits,
            "shadow_prices": allocation.shadow_prices,
            "solver": allocation.solver,
        }
        print(f"{name}: {found[name]['median_seconds']:.1f} s, gap {allocation.gap:.1e}", flush=True)
    first = found["average_bits"]
    result = {
        "layers": LAYERS,
        "experts": EXPERTS,
        "projections": PROJECTIONS,
        "bits": BITS,
        "items": len(items),
        "options": len(items) * len(BITS),
        "seed": arguments.seed,
        "seconds": "wall clock of model and solution, on a shared machine",
        "target_seconds": TARGET_SECONDS,
        "target_met": first["optimal"] and first["median_seconds"] < TARGET_SECONDS,
        "problems": found,
        "hardware": hardware("cpu"),
        "versions": library_versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "allocation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not result["target_met"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
