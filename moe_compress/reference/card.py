"""The reference model's card: `python -m moe_compress.reference.card RUN_FOLDER CHECKPOINT`.

RUN_FOLDER is what `moe_compress.reference.train` wrote. Everything on the card is measured here: the tasks by lm-eval,
routing balance on held-out documents, the loss curve from the training log. Writes `README.md` and `card.json` into the
checkpoint folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers

from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.compress.scoring import score
from moe_compress.compress.surroundings import Surroundings
from moe_compress.eval.config import EvalConfig
from moe_compress.eval.harness import evaluate
from moe_compress.progress import SilentProgress
from moe_compress.reference.skills import NUM_FACTS
from moe_compress.reference.train import ROWS, SEQUENCE_LENGTH, Settings
from moe_compress.report.build import headline_metric

HELDOUT = Path(__file__).parent / "tasks" / "data"
CURVE_POINTS = 16


def routing_balance(folder: Path) -> list[dict[str, float]]:
    """Per layer, the smallest and largest share of held-out tokens that one expert serves."""
    source = open_checkpoint(str(folder))
    with TemporaryDirectory() as scratch:
        text = Path(scratch) / "text"
        text.mkdir()
        for name in ("code", "documentation"):
            (text / f"{name}.jsonl").write_bytes((HELDOUT / f"{name}.jsonl").read_bytes())
        calibration = CalibrationConfig(dataset=str(text), num_samples=64, sequence_length=SEQUENCE_LENGTH)
        around = Surroundings(calibration, 10**9, "cpu", SilentProgress())
        scores = score(source, Path(scratch) / "scores", around, "balance")
    shares = [layer.statistics["tokens"] / layer.num_tokens for layer in scores.layers]
    return [{"smallest": float(share.min()), "largest": float(share.max())} for share in shares]


def loss_curve(log: Path) -> list[tuple[int, float]]:
    """(step, mean training loss since the point before), at a few evenly spaced steps."""
    losses = {
        record["step"]: record["loss"] for record in map(json.loads, log.read_text(encoding="utf-8").splitlines())
    }
    steps = np.array(sorted(losses))
    groups = np.array_split(steps, min(CURVE_POINTS, len(steps)))
    return [(int(group[-1]), float(np.mean([losses[int(step)] for step in group]))) for group in groups]


def card(facts: dict[str, Any]) -> str:
    """The card's text, from measured facts alone."""
    tasks = "\n".join(
        f"| {task} | {entry['metric']} | {entry['value']:.4f} | {_shown(entry['stderr'])} |"
        for task, entry in facts["tasks"].items()
    )
    balance = "\n".join(
        f"| {layer} | {share['smallest']:.1%} | {share['largest']:.1%} |"
        for layer, share in enumerate(facts["balance"])
    )
    curve = "\n".join(f"| {step:,} | {loss:.3f} |" for step, loss in facts["loss_curve"])
    rows = ", ".join(f"{name} {count / sum(ROWS.values()):.1%}" for name, count in ROWS.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: cc-by-sa-4.0
tags: [MoE, reference]
---

# The reference model of moe-compress

A small, truly trained Mixture-of-Experts model (`Qwen3MoeForCausalLM`, {facts["parameters"]:,} parameters: 8 layers, 16
experts of width 96, top-4) on which every method of this package can be tried offline in minutes. It knows little of
the world and is of no other use.

Trained by `python -m moe_compress.reference.train OUT --tokens {facts["tokens"]}` ({facts["settings"]}).
Rows of a step: {rows}.
Code and documentation are those of the Python standard library, prose is from Wikipedia (enwik8), facts are
{NUM_FACTS} invented people with one attribute each, reasoning is generated. What the tasks measure was never trained
on: held-out modules and topics, question wordings and problem instances. `NOTICE.md` names the texts' licences.

## Tasks

| task | metric | value | standard error |
|---|---|---|---|
{tasks}

## Routing

Share of held-out tokens (code and documentation) that the least and the most used expert of a layer serves; 25 % would
be perfect balance.

| layer | smallest | largest |
|---|---|---|
{balance}

## Training loss

Mean over the steps since the line above.

| step | loss |
|---|---|
{curve}
"""


def _shown(stderr: float | None) -> str:
    return "not estimated" if stderr is None else f"{stderr:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the reference model and write its card.")
    transformers.utils.logging.disable_progress_bar()
    parser.add_argument("run", type=Path)
    parser.add_argument("checkpoint", type=Path)
    arguments = parser.parse_args()
    state = torch.load(arguments.run / "state.pt", weights_only=True)
    settings = Settings(**state["settings"])
    measured = evaluate(arguments.checkpoint, EvalConfig(tasks=["reference"]), "cpu")["tasks"]
    tasks = {}
    for task, metrics in measured.items():
        metric = headline_metric(metrics)
        tasks[task] = {"metric": metric, "value": metrics[metric]["value"], "stderr": metrics[metric]["stderr"]}
    source = open_checkpoint(str(arguments.checkpoint))
    facts = {
        "parameters": sum(info.numel for info in source.index.values()),
        "tokens": state["step"] * settings.batch_rows * SEQUENCE_LENGTH,
        "settings": f"seed {settings.seed}, {state['step']:,} steps of {settings.batch_rows} rows of {SEQUENCE_LENGTH}",
        "tasks": tasks,
        "balance": routing_balance(arguments.checkpoint),
        "loss_curve": loss_curve(arguments.run / "loss.jsonl"),
    }
    (arguments.checkpoint / "card.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (arguments.checkpoint / "README.md").write_text(card(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
