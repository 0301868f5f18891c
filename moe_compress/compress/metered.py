"""Changes after which tokens use another number of experts: counted on calibration tokens, noted in `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_compress.checkpoint.rewrite import LEDGER_FILE, Change, rewrite
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.surroundings import Surroundings
from moe_compress.models.layers import SECTION
from moe_compress.models.lockstep import Lockstep
from moe_compress.models.routing import EXPERTS_PER_TOKEN


class MeteredChange(Change):
    """Counts the slots that run in every changed layer; `notes` is a file that outlives an interruption."""

    notes: Path

    def meter(self, tokens: Tensor, batch_size: int, notes: Path) -> None:
        """Count on these tokens [N, S]."""
        self.tokens, self.batch_size, self.notes = tokens, batch_size, notes

    def store(self, target: LayerStream, index: int, run: Lockstep) -> dict[str, Tensor]:
        if self.tokens is not None and index in target.moe_layers:
            moe = target.moe_layers[index]
            meter = _Meter(self.notes, index, moe.num_experts, len(self.tokens.split(self.batch_size)))
            moe.experts.register_forward_pre_hook(meter, with_kwargs=True)
            if index == len(target.layers) - 1:  # which only the probe passes
                run.rehearse(index)
        return super().store(target, index, run)


class _Meter:
    """Sees what comes to a layer's experts, after the rules that take slots out; the first call is the probe's."""

    def __init__(self, notes: Path, layer: int, num_experts: int, batches: int) -> None:
        self.notes, self.layer, self.num_experts, self.batches = notes, layer, num_experts, batches
        self.calls = self.tokens = self.slots = 0

    def __call__(self, module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self.calls > self.batches:
            return
        _, index_TK, gate_TK = (*inputs, *keywords.values())
        if self.calls:
            self.tokens += len(index_TK)
            self.slots += int(((index_TK < self.num_experts) & (gate_TK != 0)).sum())
        self.calls += 1
        if self.calls > self.batches:
            write_json(self.notes, experts_per_token(self.notes) | {self.layer: self.slots / self.tokens})


def experts_per_token(notes: Path) -> dict[int, float]:
    """The mean of each layer that was counted."""
    if not notes.exists():
        return {}
    return {int(layer): mean for layer, mean in json.loads(notes.read_text(encoding="utf-8")).items()}


def write_metered(
    source: Checkpoint, folder: Path, change: MeteredChange, tokens: Tensor, around: Surroundings, title: str
) -> dict[int, float]:
    """Write `folder/checkpoint`, unless it is complete, and the counted means into its `config.json`; returns them."""
    notes = folder / "experts_per_token.json"
    change.meter(tokens, around.calibration.batch_size, notes)
    checkpoint = folder / "checkpoint"
    if not (checkpoint / LEDGER_FILE).exists():
        with around.progress.stage(f"{title}: apply", source.config.get_text_config().num_hidden_layers) as stage:
            rewrite(
                source, checkpoint, change, max_shard_bytes=around.max_shard_bytes, device=around.device, stage=stage
            )
    found = experts_per_token(notes)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for layer, mean in found.items():
        config[SECTION]["layers"][str(layer)][EXPERTS_PER_TOKEN] = mean
    write_json(checkpoint / "config.json", config)
    return found
