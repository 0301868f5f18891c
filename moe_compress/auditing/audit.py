"""Does the criterion mean anything on this model? Experts are taken out for real, and criteria judged by what it costs.

In every audited layer a seeded sample of experts is removed one by one, each for whole sequences of held-out text, and
the loss is compared sequence by sequence with that of the whole model. Every criterion is then asked how it ranks these
experts (`compress.prune.judged`, `calibrate.agreement`).

    WORK/scores.json, scores.safetensors   the scores, with the statistic `ablation`
    WORK/ablation/losses.json              the loss of every sequence without each expert
    WORK/audit.json, audit.md              what was found

Not covered: what removing several experts at once costs, and effects that no next-token loss shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_compress.calibrate.ablation import with_importance
from moe_compress.calibrate.agreement import AUDIT_FILE
from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.data import Calibration
from moe_compress.calibrate.scores import ABLATION
from moe_compress.checkpoint.source import Checkpoint, open_checkpoint
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress import scoring
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.compress.prune.judged import judged
from moe_compress.compress.surroundings import Surroundings
from moe_compress.errors import UsageError
from moe_compress.manifest import describe_source, made_by
from moe_compress.models.layers import find_moe_layers
from moe_compress.models.skeleton import build_skeleton
from moe_compress.preparation import GivenScores, look, surroundings
from moe_compress.progress import Progress
from moe_compress.recipe import Recipe
from moe_compress.report.audit import audit_markdown
from moe_compress.workspace import discarded_if_empty, explained_disk_errors, locked, open_workspace

AUDIT_PAGE = "audit.md"


@dataclass(frozen=True)
class AuditSettings:
    """How much is measured: `experts` of each of `layers` layers (None is all), on `sequences` held-out sequences.

    They are of the calibration data, from documents that calibration does not use, or of the data set `held_out`.
    """

    experts: int | None = 8
    layers: int | None = None
    sequences: int = 32
    held_out: str | None = None
    seed: int = 0


def audit(
    recipe: Recipe,
    work: Path,
    settings: AuditSettings,
    *,
    scores: Path | None = None,
    force: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what single experts are worth and how the criteria rank them; returns what `work/audit.json` holds.

    Whatever was measured before in `work` is not measured again, so an interrupted audit goes on, and more experts can
    be asked for later. `scores` are a folder that `score` wrote for this model and calibration. Raises `UsageError` for
    settings that leave nothing to rank, `DataError` when there is too little text.
    """
    _check(settings)
    around = surroundings(recipe, device, progress)
    config, folder, _, _ = look(recipe, {"WORK": work} | ({"--scores": scores} if scores else {}))
    chosen = sample({layer.layer: layer.num_experts for layer in find_moe_layers(build_skeleton(config))}, settings)
    known = scoring.read_calibration(folder, config, recipe.calibration)
    around = replace(around, data=known)
    held_out = _held_out(folder, config, recipe.calibration, settings)
    source = open_checkpoint(recipe.model, recipe.revision)
    described = describe_source(source)
    given = GivenScores.load(recipe, scores) if scores is not None else None
    if given is not None:
        given.require_fitting(described, around)
    identity = made_by(around.device) | {
        "source": described,
        "calibration": recipe.calibration.model_dump(mode="json"),
        "held-out tokens": held_out.fingerprint,
    }
    with locked(work, option=""):
        open_workspace(work, identity, resume=not force, force=force, option="")
        with discarded_if_empty(work), explained_disk_errors(work, "run the same command again"):
            if given is not None and not (work / "scores.json").exists():
                given.scores.save(work)
            return _measure(recipe, source, work, around, settings, chosen, held_out)


def _measure(
    recipe: Recipe,
    source: Checkpoint,
    work: Path,
    around: Surroundings,
    settings: AuditSettings,
    chosen: dict[int, list[int]],
    held_out: Calibration,
) -> dict[str, Any]:
    """Scores, losses and what they say about each other."""
    measured = scoring.score(source, work, around, "audit")
    losses = scoring.ablations(source, held_out.tokens, chosen, work / ABLATION, around, "audit")
    measured = with_importance(measured, losses)
    measured.save(work)
    asked = [step.criterion for step in recipe.steps if isinstance(step, PruneConfig)]
    found = judged(measured, losses, chosen, asked, settings.seed)
    found["settings"] |= {"sequence_length": held_out.tokens.shape[1], "held_out": held_out.sources}
    found |= {"model": recipe.model, "revision": source.revision}
    write_json(work / AUDIT_FILE, found)
    (work / AUDIT_PAGE).write_text(audit_markdown(found), encoding="utf-8")
    return found


def sample(counts: Mapping[int, int], settings: AuditSettings) -> dict[int, list[int]]:
    """The experts to take out, by layer: layers spread evenly over the model, experts drawn by the seed.

    `counts` says how many experts each layer has. A larger sample of the same seed contains the smaller one. Raises
    `UsageError` when more are asked for than there are.
    """
    layers = list(counts)
    if settings.layers is not None:
        if settings.layers > len(layers):
            raise UsageError(f"--layers {settings.layers}: the model has {len(layers)} layers with experts.")
        positions = np.linspace(0, len(layers) - 1, settings.layers).round().astype(int)
        layers = [layers[position] for position in positions]
    chosen = {}
    for layer in layers:
        count = counts[layer] if settings.experts is None else settings.experts
        if count > counts[layer]:
            raise UsageError(f"--experts {count}: layer {layer} has {counts[layer]} experts.")
        order = np.random.default_rng([settings.seed, layer]).permutation(counts[layer])
        chosen[layer] = sorted(order[:count].tolist())
    return chosen


def _check(settings: AuditSettings) -> None:
    if settings.experts is not None and settings.experts < 3:
        raise UsageError(f"--experts {settings.experts}: fewer than 3 experts of a layer cannot be ranked.")
    if settings.sequences < 2:
        raise UsageError("--sequences: an interval needs 2 sequences at least.")
    if settings.layers is not None and settings.layers < 1:
        raise UsageError("--layers should be 1 or more.")


def _held_out(folder: Path, config: Any, calibration: CalibrationConfig, settings: AuditSettings) -> Calibration:
    """The sequences that losses are measured on."""
    if settings.held_out is None:
        return scoring.read_held_out(folder, config, calibration, settings.sequences)
    other = {"dataset": settings.held_out, "num_samples": settings.sequences, "seed": calibration.seed}
    length = {"sequence_length": calibration.sequence_length}
    return scoring.read_calibration(folder, config, CalibrationConfig.model_validate(other | length))
