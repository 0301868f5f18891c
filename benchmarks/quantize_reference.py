"""What quantization costs the built-in model: allocations at 2.5 bits, the whole frontier, joint dropping, 4 bits.

    python -m benchmarks.quantize_reference [--folder DIR] [--only NAME ...]

Experts are scored once (all options, projections and drops, every cost), then every row is planned, written by GPTQ or
rounding, and evaluated by lm-eval on the `reference` tasks, the rows of the frontier on its two texts alone. Group size
32 (the experts are 96 wide), asymmetric, scales in bfloat16. Rows that are there are kept, so the script may be stopped
and started again. Results go to `benchmarks/results/quantize_reference.json`, the frontier to `quantize_frontier.csv`
and, where matplotlib is installed, `quantize_frontier.svg`.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.rewrite import open_rewritten, rewrite
from moe_compress.checkpoint.source import Checkpoint, open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.prune.apply import PruneChange
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.compress.prune.step import PruneStep
from moe_compress.compress.quantize.apply import QuantizeChange
from moe_compress.compress.quantize.config import QuantizeConfig
from moe_compress.compress.quantize.sizes import Sizes
from moe_compress.compress.quantize.step import QuantizeStep
from moe_compress.compress.quantize.storage import scale_dtype_of
from moe_compress.compress.scoring import calibration_data
from moe_compress.eval.config import EvalConfig
from moe_compress.eval.harness import evaluate
from moe_compress.manifest import hardware, library_versions
from moe_compress.preparation import surroundings
from moe_compress.progress import SilentProgress
from moe_compress.recipe import load_recipe

RESULTS = Path(__file__).parent / "results"
TEXTS = ["reference_code", "reference_documentation"]
CALIBRATION = {"dataset": "reference", "num_samples": 64, "sequence_length": 512, "batch_size": 8}
COMMON = {"op": "quantize", "group_size": 32, "symmetric": False}
SCORED = COMMON | {
    "average_bits": 2.5, "cost": "fisher", "granularity": "projection", "allow_drop": True, "gradient_samples": 32,
    "options": [1, 2, 3, 4, 6],
}  # fmt: skip
BEST = {"cost": "output_error", "granularity": "projection"}
FISHER = {"cost": "fisher", "granularity": "projection"}
MIX = {"options": [2, 3]}
NO_SIGNS = {"options": [2, 3, 4, 6], "protect_super_experts": False}  # as uniform widths: no 1 bit, nobody protected
BUDGETS = [round(1.6 + 0.2 * step, 1) for step in range(13)]


def rows() -> dict[str, dict[str, Any]]:
    """Name -> settings of a quantize step, `tasks`, and for the sequence also `keep`."""
    at = {"average_bits": 2.5}
    found: dict[str, dict[str, Any]] = {
        "original": {"none": True},
        "lp output_error": at | {"cost": "output_error"},
        "lp pmq": at | {"cost": "pmq"},
        "lp pmq_as_released": at | {"cost": "pmq_as_released"},
        "lp fisher": at | {"cost": "fisher"},
        "lp output_error, projections": at | BEST,
        "lp fisher, projections": at | FISHER,
        "uniform 2/3 by frequency": at | MIX | {"allocation": "frequency"},
        "uniform 2/3 by layer": at | MIX | {"allocation": "layer"},
        "4 bits": {"bits": 4},
        "pruned to 75 %, then 3 bits": {"bits": 3, "keep": 0.75},
        "joint drop and bits": BEST | {"allow_drop": True, "stored_bytes": "pruned to 75 %, then 3 bits"},
    }
    found |= {
        "lp fisher, from 2 bits": at | NO_SIGNS | {"cost": "fisher"},
        "lp fisher, projections, from 2 bits": at | NO_SIGNS | FISHER,
        "lp output_error, projections, from 2 bits": at | NO_SIGNS | BEST,
    }
    found |= {f"random {seed}": at | {"allocation": "random", "seed": seed} for seed in range(3)}
    for budget in BUDGETS:
        found[f"frontier lp {budget}"] = BEST | {"average_bits": budget, "tasks": TEXTS}
        if budget >= 2:
            found[f"frontier lp-from-2 {budget}"] = BEST | NO_SIGNS | {"average_bits": budget, "tasks": TEXTS}
    for method in ("gptq", "rtn"):
        for bits in (2, 3, 4):
            found[f"frontier {method} {bits}"] = {"method": method, "bits": bits, "tasks": TEXTS}
    return found


class Bench:
    """The built-in model, its scores and calibration tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, open_checkpoint("reference")
        config, self.around = self._settings(SCORED)
        self.data = calibration_data(self.source, self.around)
        self.scores = QuantizeStep(config).score(self.source, folder / "scores", self.around, "score")

    def row(self, settings: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
        """Sizes and task results of one row; `known` are the rows that are there already."""
        started = time.perf_counter()
        settings = dict(settings)
        tasks, keep = settings.pop("tasks", ["reference"]), settings.pop("keep", None)
        if settings.pop("none", False):
            return self._figures(self.source, {}, tasks, started)
        if isinstance(settings.get("stored_bytes"), str):
            settings["stored_bytes"] = f"{known[settings['stored_bytes']]['stored_bytes']}B"
        source, scores = self.source, self.scores
        if keep is not None:
            source, scores = self._pruned(keep)
        config, _ = self._settings(COMMON | settings)
        stream = LayerStream(source)
        plan = QuantizeStep(config).plan(scores, Sizes.of_stream(stream), source.config, "plugin")
        tokens = self.data.tokens if config.method == "gptq" else None
        change = QuantizeChange(
            plan, [], tier="plugin", scale_dtype=scale_dtype_of(stream), tokens=tokens, batch_size=8
        )
        out = self.folder / "quantized"
        self._rewrite(source, out, change)
        written = open_rewritten(out, source)
        described = {
            "average_bits": plan.average_bits,
            "dropped_experts": plan.num_dropped,
            "allocation": plan.allocation,
            "widths": _widths(plan.layers),
        }
        found = self._figures(written, described, tasks, started)
        shutil.rmtree(out)
        return found

    def _pruned(self, keep: float) -> tuple[Checkpoint, Scores | None]:
        config = PruneConfig(op="prune", criterion="reap", keep=keep)
        out = self.folder / "pruned"
        if not out.exists():
            self._rewrite(self.source, out, PruneChange(PruneStep(config).plan(self.scores, self.source.config)))
        return open_rewritten(out, self.source), None

    def _rewrite(self, source: Checkpoint, out: Path, change: Any) -> None:
        shutil.rmtree(out, ignore_errors=True)
        with SilentProgress().stage("", 1) as stage:
            rewrite(source, out, change, max_shard_bytes=4 * 10**9, device="cpu", stage=stage)

    def _figures(
        self, checkpoint: Checkpoint, described: dict[str, Any], tasks: list[str], started: float
    ) -> dict[str, Any]:
        found = evaluate(checkpoint.folder, EvalConfig(tasks=tasks, speed=False))["tasks"]
        scores = {task: {name: metric["value"] for name, metric in metrics.items()} for task, metrics in found.items()}
        errors = {task: {name: metric["stderr"] for name, metric in metrics.items()} for task, metrics in found.items()}
        texts = [scores[task]["bits_per_byte"] for task in TEXTS]
        return described | {
            "stored_bytes": checkpoint.index.nbytes,
            "mean_bits_per_byte": sum(texts) / len(texts),
            "tasks": scores,
            "stderr": errors,
            "seconds": round(time.perf_counter() - started, 1),
        }

    def _settings(self, step: dict[str, Any]) -> tuple[QuantizeConfig, Any]:
        content = {
            "model": "reference",
            "calibration": CALIBRATION,
            "steps": [step],
            "export": {"tier": "plugin"},
        }
        recipe = load_recipe(content)
        config = recipe.steps[0]
        assert isinstance(config, QuantizeConfig)
        return config, surroundings(recipe, "cpu", None)


def _widths(layers: Any) -> dict[str, int]:
    """How many matrices have each option."""
    counts: dict[str, int] = {}
    for layer in layers:
        for names in layer.options.values():
            for name in names:
                counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def write_frontier(found: dict[str, Any]) -> None:
    """The frontier's rows as CSV and, where matplotlib is installed, as a plot."""
    lines = []
    for name, row in found.items():
        if name.startswith("frontier "):
            _, kind, _ = name.split(" ", 2)
            codes = [row["tasks"][task]["bits_per_byte"] for task in TEXTS]
            loss = (row["allocation"] or {}).get("loss", "")
            lines.append([kind, row["average_bits"], row["stored_bytes"], *codes, row["mean_bits_per_byte"], loss])
    lines.sort(key=lambda line: (line[0], line[1]))
    header = ["curve", "average_bits", "stored_bytes", "code", "documentation", "mean_bits_per_byte", "predicted_loss"]
    with (RESULTS / "quantize_frontier.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    labels = {
        "lp": "chosen by the program, 1 to 4 bits",
        "lp-from-2": "chosen by the program, 2 to 6 bits",
        "gptq": "uniform GPTQ",
        "rtn": "uniform rounding",
    }
    for kind, label in labels.items():
        curve = [line for line in lines if line[0] == kind]
        axes.plot([line[2] / 1e6 for line in curve], [line[5] for line in curve], marker="o", label=label)
    axes.axhline(found["original"]["mean_bits_per_byte"], color="gray", linestyle="--", label="original")
    axes.set(xlabel="stored MB", ylabel="bits per byte, mean of code and documentation")
    axes.legend()
    figure.savefig(RESULTS / "quantize_frontier.svg", bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where scores and checkpoints lie (default: a temporary folder)")
    parser.add_argument("--only", nargs="*", default=[], help="names, or beginnings of names, of the rows wanted")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="quantize-"))
    file = RESULTS / "quantize_reference.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else {}
    bench = Bench(folder)
    for name, settings in rows().items():
        if name in found or (options.only and not name.startswith(tuple(options.only))):
            continue
        found[name] = bench.row(settings, found)
        print(f"{name}: {found[name]['mean_bits_per_byte']:.4f} bits per byte, {found[name]['seconds']} s", flush=True)
        content = {
            "calibration": CALIBRATION,
            "fingerprint": bench.data.fingerprint,
            "step": COMMON,
            "versions": library_versions(),
            "hardware": hardware("cpu"),
            "rows": found,
        }
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_frontier(found)


if __name__ == "__main__":
    main()
