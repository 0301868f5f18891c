"""How every criterion ranks the experts that were taken out one by one, and what that says of it: numbers only.

The statistics are those of `moe-compress score`: tokens that chose an expert are counted where they chose it, and gate
values are those that multiplied its output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from moe_compress.calibrate.ablation import Losses
from moe_compress.calibrate.agreement import AuditedLayer, agreement
from moe_compress.calibrate.scores import ABLATION, LayerScores, Scores
from moe_compress.compress.prune.config import CriterionName, CustomCriterion, PruneConfig
from moe_compress.compress.prune.plan import criterion_scores
from moe_compress.manifest import library_versions

FORMAT = 1
# Beside the named criteria: the mean gate value of an expert when it is chosen.
MEAN_GATE = CustomCriterion(b=1, alpha=1, beta=0)


def judged(
    scores: Scores, losses: Losses, experts: Mapping[int, Sequence[int]], asked: Sequence[Any], seed: int
) -> dict[str, Any]:
    """The content of `audit.json`, from the losses without these `experts` (by layer).

    `asked` are the criteria that a recipe names. What the losses were measured on is for the caller to add, in
    `settings`.
    """
    criteria = audited_criteria(asked, seed)
    layers = [
        audited_layer(layer, experts[layer.layer], losses, criteria)
        for layer in scores.layers
        if layer.layer in experts
    ]
    return {
        "format": FORMAT,
        "criteria_of_the_recipe": [criterion_label(criterion) for criterion in asked],
        "settings": {
            "sequences": len(losses.whole_N),
            "calibration_tokens": scores.layers[0].num_tokens,
            "seed": seed,
            "replaced_in": list(losses.replaced_in),
        },
        "loss": float(losses.whole_N.mean()),
        "versions": library_versions(),
    } | agreement(layers, seed)


def audited_criteria(asked: Sequence[Any], seed: int) -> dict[str, PruneConfig]:
    """Every criterion that a statistic stands for, those that a recipe asks for among them, by name."""
    names: list[Any] = [name for name in get_args(CriterionName) if name != ABLATION]
    names += [MEAN_GATE, *(criterion for criterion in asked if isinstance(criterion, CustomCriterion))]
    return {
        criterion_label(criterion): PruneConfig.model_validate(
            {"op": "prune", "criterion": criterion, "keep": 1} | ({"seed": seed} if criterion == "random" else {})
        )
        for criterion in names
    }


def audited_layer(
    layer: LayerScores, experts: Sequence[int], losses: Losses, criteria: dict[str, PruneConfig]
) -> AuditedLayer:
    """What was measured of a layer's experts, and what the criteria give them."""
    own = list(experts)
    changes_nN = np.stack([losses.changes((layer.layer, expert)) for expert in own])
    scores = {name: criterion_scores(config, layer)[own] for name, config in criteria.items()}
    return AuditedLayer(layer.layer, tuple(own), changes_nN, scores)


def criterion_label(criterion: Any) -> str:
    """`reap`, `{b: 1, alpha: 1, beta: 0}`."""
    if isinstance(criterion, str):
        return criterion
    return f"{{b: {criterion.b:g}, alpha: {criterion.alpha}, beta: {criterion.beta}}}"
