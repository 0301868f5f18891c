"""Which experts to keep: numbers in, numbers out, no torch. Reads no weights and predicts no cost.

Scores follow arXiv 2606.15716 (the family n^(-b) * sum g^alpha |f|^beta), arXiv 2504.06792 (EASY-EP) and
arXiv 2507.00390 (MoNE); super experts follow arXiv 2507.23279. Sums run over the tokens routed to an expert. An
expert that was never routed scores 0 under every criterion but `random`, so it is dropped first, unless the loss of
others is a gain (`ablation`: what taking the expert out adds to the loss, mean over sequences). Of equal scores the
lower expert index (and, in a global ranking, the lower layer) is kept.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_compress.calibrate.scores import ABLATION, LayerScores, Scores
from moe_compress.compress.prune.config import ACCUMULATED_SUMS, CustomCriterion, PruneConfig
from moe_compress.errors import DataError, UsageError
from moe_compress.text import listed

FORMAT = 1
MAX_LISTED = 20
Array = NDArray[np.float64]

# (b, alpha, beta) of the named members of the family.
EXPONENTS: dict[str, tuple[int, int, int]] = {
    "frequency": (0, 0, 0),
    "seer": (0, 1, 0),
    "ean": (0, 0, 1),
    "reap": (1, 1, 1),
    "man": (1, 0, 1),
    "msan": (1, 0, 2),
}
SUPER_EXPERT_PERCENTILE = 99.5
SUPER_EXPERT_SHARE_OF_MAX = 0.1
SUPER_EXPERT_EARLY_LAYERS = 0.75


@dataclass(frozen=True)
class LayerPlan:
    """One MoE layer: the experts to keep (ascending), every expert's score, and the experts that were protected."""

    layer: int
    num_experts: int
    keep: tuple[int, ...]
    scores: tuple[float, ...]
    protected: tuple[int, ...]


@dataclass(frozen=True)
class PrunePlan:
    """What a prune step does to every MoE layer."""

    config: PruneConfig
    layers: tuple[LayerPlan, ...]

    @property
    def num_experts(self) -> int:
        """Experts of all layers before pruning."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def num_kept(self) -> int:
        """Experts of all layers after pruning."""
        return sum(len(layer.keep) for layer in self.layers)

    @property
    def num_asked(self) -> float:
        """Experts of all layers that `keep` asked for, before any rounding."""
        keep = self.config.keep
        return float(keep * len(self.layers) if isinstance(keep, int) else keep * self.num_experts)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able values; `asked`, `achieved` and `summary` are for the reader."""
        return {
            "format": FORMAT,
            "op": "prune",
            "summary": self._summary(),
            "config": self.config.model_dump(mode="json"),
            "asked": {"keep": self.config.keep, "experts": self.num_asked},
            "achieved": {"keep": self.num_kept / self.num_experts, "experts": self.num_kept, "of": self.num_experts},
            "layers": [
                {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(layer).items()}
                for layer in self.layers
            ],
        }

    def _summary(self) -> list[str]:
        config = self.config
        criterion = config.criterion if isinstance(config.criterion, str) else config.criterion.model_dump()
        lines = [
            f"criterion {criterion}, scope {config.scope}: {self.num_kept} of {self.num_experts} experts kept "
            f"({self.num_kept / self.num_experts:.1%}); asked: keep {config.keep}, {self.num_asked:g} experts."
        ]
        counts = sorted({len(layer.keep) for layer in self.layers})
        span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        lines.append(f"Each of {len(self.layers)} layers keeps {span} experts.")
        if config.replace is not None:
            lines.append("The others become their mean outputs; the router keeps its rows.")
        protected = [f"layer {layer.layer} expert {expert}" for layer in self.layers for expert in layer.protected]
        if protected:
            lines.append(f"Protected super experts: {listed(protected, MAX_LISTED)}.")
        return lines


def criterion_scores(config: PruneConfig, layer: LayerScores) -> Array:
    """Score of every expert of one layer, higher is kept, float64 [E].

    `random` draws from (seed, layer) and ignores the statistics. `mone` is the L2 norm over channels of the outputs'
    standard deviation (over n, not n - 1), times the mean gate value. Raises `DataError` on a non-finite statistic.
    """
    criterion = config.criterion
    if criterion == "random":
        return np.random.default_rng([config.seed, layer.layer]).random(layer.num_experts)
    statistics = layer.statistics
    # Without tokens every sum is 0, and so is the score.
    count = np.maximum(statistics["tokens"], 1.0)
    if criterion == ABLATION:
        scores = _measured_importance(layer)
    elif criterion == "easy_ep":
        scores = statistics["easy_ep"]
    elif criterion == "mone":
        mean_EH = statistics["output_sum"] / count[:, None]
        variance_EH = statistics["output_sq_sum"] / count[:, None] - mean_EH**2
        # Rounding can leave a tiny negative variance where an output hardly varies.
        spread = np.sqrt(np.maximum(variance_EH, 0.0).sum(axis=1))
        scores = spread * statistics["gate_sum"] / count
    else:
        if isinstance(criterion, CustomCriterion):
            b, alpha, beta = criterion.b, criterion.alpha, criterion.beta
        else:
            b, alpha, beta = EXPONENTS[criterion]
        scores = statistics[ACCUMULATED_SUMS[alpha, beta]] * count ** -float(b)
    _require_finite(scores, layer.layer)
    return scores


def _measured_importance(layer: LayerScores) -> Array:
    """The statistic `ablation`; `UsageError` when it was measured for some experts only, or for none."""
    found = layer.statistics.get(ABLATION)
    missing = layer.num_experts if found is None else int(np.isnan(found).sum())
    if found is None or missing:
        raise UsageError(
            f"criterion: ablation: the scores hold no loss without {missing} of the {layer.num_experts} experts of "
            f"layer {layer.layer}; measure all with `moe-compress score`, or with `moe-compress audit --experts all`."
        )
    return found


def super_experts(scores: Scores, num_decoder_layers: int) -> set[tuple[int, int]]:
    """(layer, expert) of the super experts among the routed experts (arXiv 2507.23279).

    Over the experts of the first 75 % of the decoder layers: max|f| strictly above the 99.5th percentile and strictly
    above a tenth of the largest. An expert without tokens counts as 0. Raises `DataError` on a non-finite statistic.
    """
    num_early = round(SUPER_EXPERT_EARLY_LAYERS * num_decoder_layers)
    early = [layer for layer in scores.layers if layer.layer < num_early]
    if not early:
        return set()
    peaks = [np.where(layer.statistics["tokens"] > 0, layer.statistics["max_abs"], 0.0) for layer in early]
    for layer, layer_peaks in zip(early, peaks, strict=True):
        _require_finite(layer_peaks, layer.layer)
    everywhere = np.concatenate(peaks)
    percentile = np.percentile(everywhere, SUPER_EXPERT_PERCENTILE)
    threshold = max(percentile, everywhere.max() * SUPER_EXPERT_SHARE_OF_MAX)
    return {
        (layer.layer, int(expert))
        for layer, layer_peaks in zip(early, peaks, strict=True)
        for expert in np.flatnonzero(layer_peaks > threshold)
    }


def keep_count(
    config: PruneConfig, *, num_experts: int, top_k: int, num_groups: int = 1, groups_per_token: int | None = None
) -> int:
    """Experts one layer keeps with `scope: layer`; a `UsageError` naming what is possible when `keep` is not.

    A fraction is rounded to the nearest count, then to the nearest multiple of `multiple_of` that the layer holds,
    at least one multiple; halves round up. The arguments are those of `plan_prune`.
    """
    if config.replace is not None:
        num_groups, groups_per_token = 1, None
    unit = math.lcm(config.multiple_of, num_groups)
    smallest = _smallest_count(config, num_experts, top_k, num_groups, groups_per_token)
    asked = config.keep if isinstance(config.keep, int) else _nearest(config.keep * num_experts)
    if asked > num_experts:
        raise UsageError(f"keep: {asked} asks for more experts than the {num_experts} a layer has; lower it.")
    multiple = config.multiple_of
    count = min(max(_nearest(asked / multiple), 1), num_experts // multiple) * multiple
    if count < smallest:
        raise UsageError(
            f"keep: {config.keep} leaves {count} of {num_experts} experts, too few for this router (top-k {top_k}"
            f"{f', {num_groups} groups' if num_groups > 1 else ''}); the smallest possible is keep: {smallest}."
        )
    if count % num_groups:
        below, above = count // unit * unit, (count // unit + 1) * unit
        possible = [near for near in (below, above) if smallest <= near <= num_experts]
        raise UsageError(
            f"keep: {config.keep} leaves {count} experts, which {num_groups} routing groups cannot share equally; "
            f"the nearest possible is keep: {' or '.join(str(near) for near in possible)}."
        )
    return count


def plan_prune(
    config: PruneConfig,
    scores: Scores,
    *,
    num_decoder_layers: int,
    num_groups: int = 1,
    groups_per_token: int | None = None,
) -> PrunePlan:
    """Choose the experts every layer keeps.

    `num_groups` is the router's number of expert groups, each a run of consecutive experts that stay equally many;
    `groups_per_token` is how many of them a token may use, all when None; neither matters where dropped experts leave
    a constant behind, since the router keeps its rows. `scope: global` ranks raw scores over all
    layers; where counts must be multiples, the next best experts are added together, ranked by their mean score.
    Raises `UsageError` when `keep` is impossible or more experts are protected than kept, `DataError` on non-finite
    statistics.
    """
    if config.replace is not None:
        num_groups, groups_per_token = 1, None
    found = super_experts(scores, num_decoder_layers) if config.protect_super_experts else set()
    values = [criterion_scores(config, layer) for layer in scores.layers]
    protected = [sorted(expert for index, expert in found if index == layer.layer) for layer in scores.layers]
    ranked = [_ranked(*pair, num_groups) for pair in zip(values, protected, strict=True)]
    if config.scope == "layer":
        counts = [
            keep_count(
                config,
                num_experts=layer.num_experts,
                top_k=layer.top_k,
                num_groups=num_groups,
                groups_per_token=groups_per_token,
            )
            for layer in scores.layers
        ]
    else:
        smallest = [
            _smallest_count(config, layer.num_experts, layer.top_k, num_groups, groups_per_token)
            for layer in scores.layers
        ]
        counts = _global_counts(config, values, protected, ranked, smallest)
    layers = []
    for layer, layer_values, experts, order, count in zip(
        scores.layers, values, protected, ranked, counts, strict=True
    ):
        keep = sorted(int(expert) for expert in order[:, : count // num_groups].ravel())
        missing = sorted(set(experts) - set(keep))
        if missing:
            raise UsageError(
                f"layer {layer.layer} has {len(experts)} super experts, but keep: {config.keep} leaves no room for "
                f"{missing}; raise keep, or set protect_super_experts: false."
            )
        layers.append(
            LayerPlan(layer.layer, layer.num_experts, tuple(keep), tuple(layer_values.tolist()), tuple(experts))
        )
    return PrunePlan(config, tuple(layers))


def _nearest(value: float) -> int:
    """Nearest integer, halves up: in doubt, keep more."""
    return math.floor(value + 0.5)


def _require_finite(values: Array, layer: int) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise DataError(
            f"the statistics of layer {layer}, expert {bad[0]} are not finite; the checkpoint "
            "has damaged weights there, download it again."
        )


def _smallest_count(
    config: PruneConfig, num_experts: int, top_k: int, num_groups: int, groups_per_token: int | None
) -> int:
    """Fewest experts a layer can keep: top-k of them, and enough in every routing group."""
    assert num_experts % num_groups == 0, "routing groups are equal in the source"
    needed = top_k if config.replace is None else 1
    if num_groups > 1:
        # Group-limited routers rank groups by their best two experts, and fill top-k from the groups they chose.
        needed = num_groups * max(2, math.ceil(top_k / (groups_per_token or num_groups)))
    unit = math.lcm(config.multiple_of, num_groups)
    smallest = math.ceil(needed / unit) * unit
    if smallest > num_experts:
        raise UsageError(
            f"no count of experts fits multiple_of: {config.multiple_of} in a layer of {num_experts} experts with "
            f"top-k {top_k} and {num_groups} routing group{'s' if num_groups > 1 else ''}; lower multiple_of."
        )
    return smallest


def _ranked(values: Array, protected: list[int], num_groups: int) -> NDArray[np.intp]:
    """Expert indices [G, E / G], in each routing group the protected first, then the best, then the lowest index."""
    boosted = values.copy()
    boosted[protected] = np.inf
    order_GE = np.argsort(-boosted.reshape(num_groups, -1), axis=1, kind="stable")
    return order_GE + np.arange(0, len(values), order_GE.shape[1])[:, None]


def _global_counts(
    config: PruneConfig,
    values: list[Array],
    protected: list[list[int]],
    ranked: list[NDArray[np.intp]],
    smallest: list[int],
) -> list[int]:
    """Experts per layer from one ranking over all layers; each step of a layer adds `unit` experts."""
    num_groups = ranked[0].shape[0]
    unit = math.lcm(config.multiple_of, num_groups)
    per_group = unit // num_groups
    total = sum(len(layer_values) for layer_values in values)
    if isinstance(config.keep, int):
        largest = max(len(layer_values) for layer_values in values)
        if config.keep > largest:
            raise UsageError(f"keep: {config.keep} asks for more experts than the {largest} a layer has; lower it.")
        asked = config.keep * len(values)
    else:
        asked = _nearest(config.keep * total)
    steps = [len(layer_values) // unit for layer_values in values]
    wanted = min(max(_nearest(asked / unit), 1), sum(steps))
    forced = []
    for order, experts, fewest, most in zip(ranked, protected, smallest, steps, strict=True):
        in_group = np.isin(order, experts).sum(axis=1).max()
        forced.append(min(max(fewest // unit, math.ceil(in_group / per_group)), most))
    if wanted < sum(forced):
        raise UsageError(
            f"keep: {config.keep} leaves {wanted * unit} of {total} experts over all layers, but every layer needs "
            f"its top-k and its super experts; the smallest possible is {sum(forced) * unit} "
            f"(keep: {math.ceil(sum(forced) * unit / total * 1e4) / 1e4})."
        )
    owners, means = [], []
    for index, (layer_values, order) in enumerate(zip(values, ranked, strict=True)):
        for step in range(forced[index], steps[index]):
            owners.append(index)
            means.append(layer_values[order[:, step * per_group : (step + 1) * per_group]].mean())
    best = np.argsort(-np.asarray(means), kind="stable")[: wanted - sum(forced)]
    chosen = np.bincount(np.asarray(owners, dtype=np.intp)[best], minlength=len(values))
    return [(first + int(more)) * unit for first, more in zip(forced, chosen, strict=True)]
