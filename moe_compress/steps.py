"""The steps of a recipe, one after the other: each turns a checkpoint folder into a checkpoint folder, kept and reused.

FOLDER/scores/       what calibration measured
FOLDER/plan.json     what happens to every expert
FOLDER/checkpoint/   the new checkpoint
FOLDER/step.json     what was done; there only when the step is complete
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_compress.checkpoint.record import Record
from moe_compress.checkpoint.rewrite import LEDGER_FILE, Change, open_rewritten, rewrite
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.distill.step import DistillStep
from moe_compress.compress.merge.step import MergeStep
from moe_compress.compress.operation import Step
from moe_compress.compress.prune.step import PruneStep
from moe_compress.compress.quantize.step import QuantizeStep
from moe_compress.compress.skip.step import SkipStep
from moe_compress.compress.surroundings import Surroundings
from moe_compress.compress.tie.step import TieStep
from moe_compress.compress.topk.step import TopkStep
from moe_compress.compress.zero_experts.step import ZeroExpertsStep

FIRST_SCORES = "step-0/scores"  # in the work folder

OPERATIONS: dict[str, type[Step[Any]]] = {
    "distill": DistillStep,
    "merge": MergeStep,
    "prune": PruneStep,
    "quantize": QuantizeStep,
    "skip": SkipStep,
    "tie": TieStep,
    "topk": TopkStep,
    "zero_experts": ZeroExpertsStep,
}


def make_step(config: Any) -> Step[Any]:
    """The step that settings of a recipe describe."""
    return OPERATIONS[config.op](config)


def run_step(step: Step[Any], source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Checkpoint:
    """Run one step, going on where an earlier run of it stopped; returns the new checkpoint."""
    if not (folder / "step.json").exists():
        write_json(folder / "step.json", step.run(source, folder, around, title).to_json())
    return open_rewritten(folder / "checkpoint", source)


def run_identity(source: Checkpoint, folder: Path, around: Surroundings) -> Checkpoint:
    """Stream the checkpoint through its layers unchanged."""
    checkpoint = folder / "checkpoint"
    if not (checkpoint / LEDGER_FILE).exists():
        with around.progress.stage("identity", source.config.get_text_config().num_hidden_layers) as stage:
            rewrite(
                source,
                checkpoint,
                Change(),
                max_shard_bytes=around.max_shard_bytes,
                device=around.device,
                stage=stage,
            )
    return open_rewritten(checkpoint, source)


def load_record(folder: Path) -> Record:
    """What a finished step did."""
    return Record.from_json(json.loads((folder / "step.json").read_text(encoding="utf-8")))
