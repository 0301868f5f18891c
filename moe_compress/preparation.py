"""What comes before any work on a recipe: every refusal that needs no weights, and scores that were given along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from moe_compress.calibrate.agreement import AUDIT_FILE
from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.source import REFERENCE, load_tokenizer, open_config, require_weights, small_files
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.operation import Outlook
from moe_compress.compress.surroundings import Surroundings, resolved
from moe_compress.errors import UsageError
from moe_compress.preview import (
    calibration_differences,
    look_ahead,
    require_paths,
    require_same_model,
    step_warnings,
    task_warnings,
)
from moe_compress.progress import Progress, SilentProgress
from moe_compress.recipe import Recipe
from moe_compress.report.audit import load_audit
from moe_compress.steps import make_step
from moe_compress.workspace import refuse_overlap


def surroundings(recipe: Recipe, device: str, progress: Progress | None) -> Surroundings:
    """Where and how a recipe's work is done. Raises `UsageError` when there is no such device."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is the one that shows
    return Surroundings(
        recipe.calibration,
        recipe.export.max_shard_size,
        resolved(device),
        progress or SilentProgress(),
        recipe.export.tier,
    )


def look(recipe: Recipe, folders: dict[str, Path]) -> tuple[PretrainedConfig, Path, list[Outlook], list[str]]:
    """The model's configuration, the folder of its tokenizer, what each step leads to, and warnings.

    Raises all refusals that need no weights.
    """
    refuse_overlap(folders | folder_of("the model", recipe.model))
    require_paths(recipe)
    config, index = open_config(recipe.model, recipe.revision)
    planned, outlooks = look_ahead(recipe, config, index)
    folder, _ = small_files(recipe.model, recipe.revision)
    return config, folder, outlooks, [*task_warnings(recipe), *step_warnings(planned, outlooks)]


def folder_of(name: str, model: str) -> dict[str, Path]:
    """The model's folder under this name; nothing for a Hub id."""
    path = REFERENCE if model == "reference" else Path(model).expanduser()
    return {name: path} if path.is_dir() else {}


def check_inputs(recipe: Recipe, folder: Path, config: PretrainedConfig) -> None:
    """Raise what would keep tasks and steps from working: no weights, no tokenizer, a task that is not known, a teacher
    that is not there."""
    require_weights(recipe.model, recipe.revision)
    steps = [make_step(step) for step in recipe.steps]
    if any(step.is_calibrated for step in steps):
        load_tokenizer(folder)
    if recipe.eval.tasks:
        from moe_compress.eval.harness import check_tasks

        check_tasks(folder, recipe.eval)
    for step in steps:
        step.check_inputs(folder, config)


@dataclass(frozen=True)
class GivenScores:
    """Scores that `score` or `audit` wrote, to be taken instead of measuring."""

    folder: Path
    scores: Scores

    @classmethod
    def load(cls, recipe: Recipe, folder: Path) -> GivenScores:
        """The scores in `folder`, judged by this recipe's least number of tokens."""
        least = recipe.calibration.min_tokens_per_expert
        return cls(folder, replace(Scores.load(folder), min_tokens_per_expert=least))

    @classmethod
    def for_first_step(cls, recipe: Recipe, folder: Path) -> GivenScores:
        """The same; `UsageError` when the recipe's first step takes none."""
        if not recipe.steps:
            raise UsageError("`--scores` has no effect: the recipe has no steps.")
        if not make_step(recipe.steps[0]).uses_scores:
            raise UsageError("`--scores` has no effect: the first step of this recipe has nothing to choose by them.")
        return cls.load(recipe, folder)

    def require_fitting(self, source: Mapping[str, Any], around: Surroundings) -> None:
        """Raise `UsageError` when they were measured on another model, or on other tokens than `around` holds.

        `source` is what `describe_source` says of the model.
        """
        require_same_model(self.scores, source["revision"], source["fingerprint"], self.folder)
        assert around.data is not None
        if self.scores.fingerprint.get("tokens") != around.data.fingerprint:
            differences = calibration_differences(self.scores, around.calibration)
            what = "; ".join(differences) or "the texts themselves changed"
            raise UsageError(
                f"the scores in {self.folder} were measured on other calibration tokens ({what}); give the same "
                "`calibration`, or leave out --scores."
            )

    def copy_to(self, folder: Path) -> None:
        """Write them as a step's own, with what an audit found out about them."""
        if audit := load_audit(self.folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / AUDIT_FILE, audit)
        self.scores.save(folder)
