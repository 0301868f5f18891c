"""What a step of a recipe is: the interface between the pipeline and the operations in the folders beside this file.

An operation is a folder with four files: `config.py` (its settings, and the rules between them), `plan.py` (numbers in,
numbers out), `apply.py` (what becomes of the tensors) and `step.py` (the class that puts them together, derived from
`Step`). `steps.py` and `recipe.py` know all operations by name; nothing else does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.record import Record
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.compress import scoring
from moe_compress.compress.demand import Demand, ModelSize, apply_demand, score_demand
from moe_compress.compress.surroundings import Surroundings
from moe_compress.eval.cost import cost

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Outlook:
    """A checkpoint as far as it is known before its weights are read.

    `config` is that of a dense model; `stored_bytes` are of the weights, `active_bytes` those read per token; `scores`
    were measured on this very checkpoint. `parts` are the stored bytes by part of the model, empty where unknown.
    `original` is the checkpoint that the recipe begins with, where its weights are at hand.
    """

    config: Any
    stored_bytes: int
    active_bytes: int
    scores: Scores | None = None
    parts: Mapping[str, int] = field(default_factory=dict)
    original: Checkpoint | None = None

    @cached_property
    def size(self) -> ModelSize:
        """What of the model takes memory."""
        return ModelSize.of(self.config, self.stored_bytes)

    def resized(self, config: Any) -> Outlook:
        """The same with other numbers of experts, nothing measured yet."""
        before, after = cost(self.config), cost(config)
        scale = self.stored_bytes / max(1, before.stored_bytes)
        parts = {
            part: round(stored * after.params[part] / before.params[part]) if before.params.get(part) else stored
            for part, stored in self.parts.items()
        }
        stored, active = round(after.stored_bytes * scale), after.active_bytes_per_token
        return Outlook(config, stored, active, None, parts, self.original)

    def of_size(
        self, *, stored_bytes: int, active_bytes: int | None = None, saved: Mapping[str, int] | None = None
    ) -> Outlook:
        """The same experts in other bytes, nothing measured yet.

        `saved` says in which parts the bytes were saved; the rest of them is the routed experts'.
        """
        active = self.active_bytes if active_bytes is None else active_bytes
        parts = {part: stored - (saved or {}).get(part, 0) for part, stored in self.parts.items()}
        if parts:
            parts["routed_experts"] += stored_bytes - sum(parts.values())
        return replace(self, stored_bytes=stored_bytes, active_bytes=active, scores=None, parts=parts)


class Step(ABC, Generic[Settings]):
    """One step of a recipe: a checkpoint folder in, a checkpoint folder out."""

    def __init__(self, config: Settings) -> None:
        self.config = config

    @property
    @abstractmethod
    def is_calibrated(self) -> bool:
        """Whether calibration tokens pass through the model."""

    @property
    def uses_scores(self) -> bool:
        """Whether what happens to an expert is decided by scores."""
        return True

    def at_random(self, seed: int) -> Step[Settings] | None:
        """The same step with its choice drawn at random, to compare with; None where it has none."""
        return None

    @abstractmethod
    def preview(self, before: Outlook, tier: str) -> tuple[dict[str, Any], Outlook]:
        """What the step would do, and what it leads to; no weights are read.

        The first has at least `op` and `summary`, sentences for the reader; `layers` where it is known what happens to
        each expert; `warnings` where settings change nothing. Raises `UsageError` or `UnsupportedModelError` when the
        step cannot be.
        """

    def check_paths(self) -> None:
        """Raise where a setting names a path and nothing is there; what is on the Hub passes."""

    def check_inputs(self, folder: Path, config: Any) -> None:
        """Raise what can be known to be wrong with what the step reads, before any step has begun.

        `folder` holds the original's tokenizer, `config` is its configuration.
        """

    def demands(self, before: Outlook, after: Outlook, calibration: CalibrationConfig) -> list[Demand]:
        """What the stages of the step take, estimated from the configurations alone.

        This is a sweep to score where the step is calibrated, and one to write; what a transformation does beyond that
        it has to add.
        """
        scored = [score_demand(before.size, calibration)] if self.is_calibrated else []
        return [*scored, apply_demand(before.size, after.size, 0, 0)]

    def score(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Scores:
        """Measure what the step decides by, or read what was measured before in `folder`."""
        return scoring.score(source, folder, around, title)

    def score_settings(self) -> dict[str, Any]:
        """What of the settings decides the scores."""
        return {}

    @abstractmethod
    def run(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Record:
        """Write `plan.json` and `checkpoint/` into `folder`, going on where an earlier run of it stopped.

        `plan.json` has at least `op` and `summary`, sentences for the reader.
        """
