"""Changes after which tokens use another number of experts: counted on calibration tokens, noted in `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
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
            meter = _Meter(self.notes, index, moe.experts, moe.num_experts, len(self.tokens.split(self.batch_size)))
            moe.experts.register_forward_pre_hook(meter.before, with_kwargs=True, prepend=True)
            moe.experts.register_forward_pre_hook(meter.after, with_kwargs=True)
            if index == len(target.layers) - 1:  # which only the probe passes
                run.rehearse(index)
        return super().store(target, index, run)


@dataclass(frozen=True)
class Counts:
    """Of one layer: tokens, slots that the router gives to each expert, and those of them that run."""

    tokens: int
    chosen: list[int]
    run: list[int]

    @property
    def experts_per_token(self) -> float:
        return sum(self.run) / self.tokens


class _Meter:
    """Sees what comes to a layer's experts before and after the rules that take slots out; first comes the probe."""

    def __init__(self, notes: Path, layer: int, experts: Any, num_experts: int, batches: int) -> None:
        self.notes, self.layer, self.experts, self.num_experts, self.batches = (
            notes, layer, experts, num_experts, batches
        )  # fmt: skip
        self.calls = self.tokens = 0
        self.chosen_E, self.run_E = (torch.zeros(num_experts, dtype=torch.long) for _ in range(2))

    def before(self, module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        _, row_TK, gate_TK = (*inputs, *keywords.values())
        if 0 < self.calls <= self.batches:
            self.chosen_E += self._count(self.experts.routing_rules.experts_of(row_TK), gate_TK)

    def after(self, module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        _, index_TK, gate_TK = (*inputs, *keywords.values())
        if 0 < self.calls <= self.batches:
            self.tokens += len(index_TK)
            self.run_E += self._count(index_TK, gate_TK)
        self.calls += 1
        if self.calls == self.batches + 1:
            found = Counts(self.tokens, self.chosen_E.tolist(), self.run_E.tolist())
            known = {number: asdict(counts) for number, counts in read_counts(self.notes).items()}
            write_json(self.notes, known | {self.layer: asdict(found)})

    def _count(self, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """Slots of each expert [E]."""
        slots = index_TK[(index_TK < self.num_experts) & (gate_TK != 0)]
        return torch.bincount(slots, minlength=self.num_experts).cpu()


def read_counts(notes: Path) -> dict[int, Counts]:
    """What was counted, by layer."""
    if not notes.exists():
        return {}
    return {int(layer): Counts(**found) for layer, found in json.loads(notes.read_text(encoding="utf-8")).items()}


def skip_ratio_map(counted: Mapping[int, Counts]) -> dict[str, Any]:
    """How often each expert is skipped, for the page of the report."""
    return {
        "title": "Skip ratio",
        "note": "Share of the calibration tokens routed to the expert that skip it.",
        "share": True,
        "provenance": "measured",
        "values": {
            layer: [1 - run / chosen if chosen else None for run, chosen in zip(found.run, found.chosen, strict=True)]
            for layer, found in counted.items()
        },
    }


def traffic_map(counted: Mapping[int, Counts]) -> dict[str, Any]:
    """How much each expert runs, for the page of the report."""
    return {
        "title": "Traffic, with zero experts",
        "note": "Share of its layer's calibration tokens that an expert runs for.",
        "share": True,
        "provenance": "measured",
        "values": {layer: [run / found.tokens for run in found.run] for layer, found in counted.items()},
    }


def write_metered(
    source: Checkpoint, folder: Path, change: MeteredChange, tokens: Tensor, around: Surroundings, title: str
) -> dict[int, Counts]:
    """Write `folder/checkpoint`, unless it is complete, and the counted means into its `config.json`.

    Returns what was counted in each layer.
    """
    notes = folder / "experts_per_token.json"
    change.meter(tokens, around.calibration.batch_size, notes)
    checkpoint = folder / "checkpoint"
    if not (checkpoint / LEDGER_FILE).exists():
        with around.progress.stage(f"{title}: apply", source.config.get_text_config().num_hidden_layers) as stage:
            rewrite(
                source, checkpoint, change, max_shard_bytes=around.max_shard_bytes, device=around.device, stage=stage
            )
    found = read_counts(notes)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for layer, counts in found.items():
        config[SECTION]["layers"][str(layer)][EXPERTS_PER_TOKEN] = counts.experts_per_token
    write_json(checkpoint / "config.json", config)
    return found
