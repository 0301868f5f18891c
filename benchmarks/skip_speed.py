"""Does a skipped slot save time? Our experts function beside transformers' own, and whole models with half skipped.

    python -m benchmarks.skip_speed --folder DIR [--threads N] [--only functions|models]

* functions: one layer's experts of the built-in model's shape and of OLMoE-1B-7B's (random weights), called on T tokens
  with random routing, nothing skipped and half of the slots skipped. `eager`, `grouped_mm` and `batched_mm` cannot
  leave slots out, they always run all; the last copies every slot's weights, and is left out where that takes over a
  GB. All are called in turn, in random order; seconds are medians.
* models: prefill and decode of the built-in model beside itself with half of the slots skipped by gate ratio, in fresh
  processes that take turns, as in every report; and of four layers of OLMoE-1B-7B's shape with random weights beside
  the same with as many zero experts as experts (`skip_layers`). Batches of 1 and 16.

Results go to `benchmarks/results/skip_speed.json`. Not covered: GPUs, and what skipping does to quality
(`skip_reference`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "skip_speed.json"
SHAPES = {"reference": (256, 96, 16, 4), "olmoe": (2048, 1024, 64, 8)}  # hidden, expert width, experts, top-k
TOKENS = (1, 4, 16, 64, 256)
SECONDS = 5.0  # for one shape, type and number of tokens
LEAST_CALLS = 15  # of each function
MOST_COPIED = 1 << 30  # bytes of weights that `batched_mm` copies
STEPS = {"reference": {"op": "skip", "target_skip": 0.5}, "olmoe": {"op": "zero_experts", "count": 1.0}}
WORKLOADS = ({"batch_size": 1}, {"batch_size": 16})


def experts_of(shape: str, dtype: Any) -> Any:
    """A fused experts module of OLMoE's class with random weights."""
    import torch
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    hidden, width, experts, top_k = SHAPES[shape]
    config = OlmoeConfig(hidden_size=hidden, intermediate_size=width, num_experts=experts, num_experts_per_tok=top_k)
    module = OlmoeExperts(config).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.02)
    return module


def calls_of(shape: str, dtype: Any, tokens: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; every result was compared with that of `eager`."""
    import torch

    from moe_compress.runtime.skipping import skipping_forward

    module = experts_of(shape, dtype)
    hidden, _, experts, top_k = SHAPES[shape]
    generator = torch.Generator().manual_seed(tokens)
    inputs = torch.randn(tokens, hidden, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    gate = torch.rand(tokens, top_k, generator=generator).to(dtype)
    half = torch.ones(tokens, top_k, dtype=torch.bool)
    half[:, : top_k // 2] = False

    def own(implementation: str) -> Callable[[], Any]:
        def call() -> Any:
            module.config._experts_implementation = implementation
            return module(inputs, index, gate)

        return call

    skipped = index.masked_fill(half, experts), gate.masked_fill(half, 0)
    calls: dict[str, Callable[[], Any]] = {
        "eager": own("eager"),
        "grouped_mm": own("grouped_mm"),
    }
    if top_k * tokens * sum(weight[0].nbytes for weight in module.parameters()) <= MOST_COPIED:
        calls["batched_mm"] = own("batched_mm")
    calls |= {
        "ours": lambda: skipping_forward(module, inputs, index, gate),
        "ours, half skipped": lambda: skipping_forward(module, inputs, *skipped),
    }
    expected = calls["eager"]()
    for name in calls.keys() - {"eager", "ours, half skipped"}:
        assert float((calls[name]() - expected).abs().max() / expected.abs().max()) < 0.02, name
    return calls


def functions() -> list[dict[str, Any]]:
    """Median seconds of every function at every shape."""
    import torch

    rows = []
    with torch.no_grad():
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                for tokens in TOKENS:
                    calls = calls_of(shape, dtype, tokens)
                    times: dict[str, list[float]] = {name: [] for name in calls}
                    names, end = list(calls), time.perf_counter() + SECONDS
                    while time.perf_counter() < end or len(times["eager"]) < LEAST_CALLS:
                        random.shuffle(names)
                        for name in names:
                            start = time.perf_counter()
                            calls[name]()
                            times[name].append(time.perf_counter() - start)
                    rows.append(row(shape, str(dtype).removeprefix("torch."), tokens, times))
                    print(rows[-1], flush=True)
    return rows


def row(shape: str, dtype: str, tokens: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and what they say."""
    seconds = {name: statistics.median(found) for name, found in times.items()}
    best = min(value for name, value in seconds.items() if not name.startswith("ours"))
    return {
        "shape": shape,
        "dtype": dtype,
        "tokens": tokens,
        "calls": len(times["eager"]),
        "seconds": seconds,
        "ours_over_best": seconds["ours"] / best,
        "speedup_with_half_skipped": best / seconds["ours, half skipped"],
    }


def models(folder: Path) -> list[dict[str, Any]]:
    """Tokens per second of original and adapted models."""
    import moe_compress
    from benchmarks import skip_layers
    from benchmarks.olmoe_shape import write
    from moe_compress.eval.speed import measure_speed

    folder.mkdir(parents=True, exist_ok=True)
    shape = folder / "olmoe-4-layers"
    write(shape, num_layers=4)
    adapted = {name: folder / f"{name}-adapted" for name in STEPS}
    for name, source in {"reference": "reference", "olmoe": str(shape)}.items():
        out = adapted[name]
        if not out.exists():
            moe_compress.run(
                {
                    "model": source,
                    "calibration": {"dataset": "reference", "num_samples": 16, "sequence_length": 256},
                    "steps": [STEPS[name]],
                    "export": {"tier": "plugin"},
                    "eval": {"tasks": [], "speed": False},
                },
                out,
            )
    rows = []
    original = Path(moe_compress.__file__).parent / "reference/checkpoint"
    figures = json.loads((adapted["reference"] / "report.json").read_text(encoding="utf-8"))
    skipped = dict.fromkeys(("prefill", "decode"), 1 - figures["ratio"]["experts_per_token_mean"])
    for workload in WORKLOADS:
        sides = {"original": original, "adapted": adapted["reference"]}
        found = measure_speed(sides, prompt_tokens=256, new_tokens=32, **workload)
        speeds = {model: entry["speed"] for model, entry in found.items()}
        settings = found["adapted"]["speed_settings"]
        rows.append({"model": "reference", "skipped": skipped, "speeds": speeds, "settings": settings})
    rows += skip_layers.rows(shape, adapted["olmoe"])
    for line in rows:
        speeds = line["speeds"]
        line["ratio"] = {key: speeds["adapted"][key] / speeds["original"][key] for key in speeds["original"]}
        print(line, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are made, 8 GB; kept")
    parser.add_argument("--threads", type=int, default=1, help="processor threads of every process")
    parser.add_argument("--only", choices=["functions", "models"], help="one part; the other's results are kept")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)

    import torch

    from moe_compress.manifest import hardware, library_versions

    torch.set_num_threads(given.threads)
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part, measure in (("functions", functions), ("models", lambda: models(given.folder))):
        if given.only in (None, part):
            made_with = {"hardware": hardware("cpu"), "versions": library_versions(), "threads": given.threads}
            found[part] = made_with | {"rows": measure()}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
