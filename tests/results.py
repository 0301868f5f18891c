"""Records of a finished folder as tests need them: small, with every part, made by the program's own `build_report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_compress.report.build import build_report

CHECKS = {
    name: {"passed": True, "detail": f"all {name} well"} for name in ("coverage", "bytes", "keys", "logits", "target")
}
OTHER_TASKS = ("qa", "prose")
BARE = {"stored_bytes": 1000}


def metric(value: float, stderr: float | None = None, higher: bool | None = True) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "higher_is_better": higher}


def model(
    size: float = 1.0, first: float = 1.0, second: float = 1.0, tasks: tuple[str, str] = ("arc_easy", "code")
) -> dict[str, Any]:
    """Figures of a model: `size` scales its experts, `first` and `second` how good it is at its two tasks."""
    return {
        "total_params": int(6_919_161_856 * size),
        "active_params": 1_281_884_160,
        "stored_bytes": int(13_838_721_024 * size),
        "active_bytes_per_token": 2_361_393_152,
        "flops_per_token": 2.461e9,
        "expert_flops_per_token": 1.611e9,
        "experts_per_token_mean": 8,
        "kv_bytes_per_token": 131_072,
        "context": 2048,
        "notes": ["the bytes of quantized weights"],
        "params_by_part": {"routed_experts": int(6_442_450_944 * size), "attention": 268_435_456},
        "bytes_by_part": {"routed_experts": int(12_884_901_888 * size), "attention": 536_870_912},
        "flops_by_part": {"routed_experts": 1.611e9, "attention": 0.85e9, "router": 2_097_152 * size},
        "tasks": {
            tasks[0]: {"acc": metric(0.76 * first, 0.0088 * first), "acc_norm": metric(0.71 * first, 0.0093)},
            tasks[1]: {"bits_per_byte": metric(1.531 / second, higher=False)},
        },
        "speed": {"prefill_tokens_per_s": 3154.7 / size, "decode_tokens_per_s": 21.9},
        "speed_turns": {"decode_tokens_per_s": {"1": 21.7 * size, "2": 21.9, "3": 22.0}},
        "speed_settings": {"batch_size": 1, "repeats": 3, "dtype": "bfloat16"},
        "peak_rss_bytes": int(15_300_000_000 * size),
    }


def draw(seed: int, bits: float, acc: float, size: float) -> dict[str, Any]:
    tasks = {
        "arc_easy": {"acc": metric(acc), "acc_norm": metric(acc - 0.01)},
        "code": {"bits_per_byte": metric(bits, higher=False)},
    }
    return {"seed": seed, "stored_bytes": int(13_838_721_024 * size), "tasks": tasks}


SETTINGS = {
    "model": "org/model",
    "revision": None,
    "criterion": ["reap", "gptq, 4 bits"],
    "steps": [{"op": "prune", "criterion": "reap", "keep": 0.75}, {"op": "quantize", "method": "gptq"}],
    "calibration": {
        "calibration_tokens": 262144,
        "fewest_tokens_per_expert": 311,
        "starved": [[3, 17]],
        "tokens": "0123abcd",
        "data": [{"dataset": "prompts.jsonl", "sequences": 128, "documents": 977, "tokens": 262144}],
    },
    "eval": {"limit": 200, "batch_size": 16, "num_fewshot": {"arc_easy": 5, "code": 0}},
    "versions": {"torch": "2.13.0"},
    "hardware": {"machine": "x86_64", "cores": 2},
}


def made(
    size: float, first: float, second: float, *, draws: bool = False, tasks: tuple[str, str] = ("arc_easy", "code")
) -> dict[str, Any]:
    """The report of a model of this relative size and recovery on its two tasks."""
    random = [draw(0, 1.9, 0.5, size), draw(1, 2.1, 0.55, size), draw(2, 2.3, 0.45, size)] if draws else []
    settings = json.loads(json.dumps(SETTINGS))
    found = build_report(model(tasks=tasks), model(size, first, second, tasks), random, CHECKS, settings)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def report_of(*, bare: bool = False) -> dict[str, Any]:
    """A report with every part, or one with hardly any."""
    if bare:
        return build_report(BARE, {"stored_bytes": 750})
    return made(0.75, 0.75, 0.8, draws=True)


def plan() -> dict[str, Any]:
    """Two steps over two layers of four experts: one is pruned in each, then the rest is quantized."""
    prune = {
        "config": {"op": "prune", "criterion": "reap", "scope": "layer"},
        "summary": ["criterion reap: 6 of 8 experts kept."],
        "layers": [
            {"layer": 1, "num_experts": 4, "keep": [0, 2, 3], "scores": [4.0, 0.5, 3.0, 2.0], "protected": [0]},
            {"layer": 3, "num_experts": 4, "keep": [0, 1, 2], "scores": [4.0, 3.0, 2.0, 0.0], "protected": []},
        ],
    }
    bits = {1: ["4", "2", "4"], 3: ["2", "2", "4"]}
    quantize = {
        "config": {"op": "quantize", "method": "gptq"},
        "layers": [
            {"layer": layer, "num_experts": 3, "keep": [0, 1, 2], "options": {"gate_proj": row, "down_proj": row}}
            for layer, row in bits.items()
        ],
    }
    return {"steps": [prune, quantize]}


def experts() -> dict[str, Any]:
    """What was measured in the first step."""
    tokens = {1: [70, 10, 15, 5], 3: [40, 20, 30, 10]}
    layers = [
        {
            "layer": layer,
            "num_experts": 4,
            "num_tokens": 50,
            "statistics": {
                "tokens": row,
                "gate_sum": [0.5 * n for n in row],
                "relative_error.expert.2": [2.5, 0.5, 1.0, 0.25],
            },
        }
        for layer, row in tokens.items()
    ]
    return {"format": 1, "steps": [{"layers": layers}, None]}


def manifest() -> dict[str, Any]:
    """As far as a page needs it."""
    return {
        "tool": "moe-compress 0.1.0",
        "source": {"model": "org/model", "revision": "abc", "fingerprint": "one", "bytes": 13838721024},
        "recipe": {
            "model": "org/model",
            "calibration": {"dataset": "prompts.jsonl", "min_tokens_per_expert": 5},
            "steps": [{"op": "prune", "criterion": "reap", "keep": 0.75}, {"op": "quantize"}],
        },
        "files": {"model.safetensors": "00ff", "config.json": "11ee"},
    }


def write_result(
    folder: Path,
    report: dict[str, Any] | None = None,
    steps: dict[str, Any] | None = None,
    manifest_content: dict[str, Any] | None = None,
    *,
    recipe: str = "model: org/model\nsteps:\n- op: prune\n",
    recipe_settings: dict[str, Any] | None = None,
) -> Path:
    """A folder with these records, or the ones above; `recipe_settings` change the first step of the recipe."""
    folder.mkdir()
    content = manifest_content or manifest()
    if recipe_settings:
        content["recipe"]["steps"][0] |= recipe_settings
    files = {"report": report or report_of(), "plan": steps or plan(), "experts": experts(), "manifest": content}
    for name, found in files.items():
        (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return folder
