"""How well scores rank experts by what taking them out costs: rank correlations, intervals, tests. Numbers only.

Within each layer the n measured experts are ranked by a criterion and by the change of the loss; Spearman's rho is the
correlation of the ranks, Kendall's tau-b the balance of concordant over discordant pairs, ties corrected. Over all
layers: the mean of the layers' values (what choosing within layers rests on), and the value over all experts pooled
(what one ranking over all layers rests on).

* Intervals (95 %): percentiles over `DRAWS` draws of sequences and, within each layer, of experts, with replacement.
  They hold both what the sample of experts and what the texts leave open.
* p: the share of `PERMUTATIONS` random reorderings of the changes within their layers whose rho is at least as large;
  one-sided, because a criterion is to be better than chance. Corrected by Holm's procedure over all criteria, and over
  all criteria and layers.
* The ceiling is what a perfect criterion would be expected to reach, given the noise of the measurement: the root of
  its reliability, which is rho between the changes on one half of the sequences and on the other, stepped up to all of
  them (Spearman-Brown); mean over `HALVES` divisions.

Arrays: C criteria, L layers, n experts of a layer, N sequences, D draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata

AUDIT_FILE = "audit.json"  # in the folder of scores, and in a result that was made with them
DRAWS = 1000
PERMUTATIONS = 10_000
HALVES = 100
PAIRS = 1 << 20  # of scores that are compared at once
INTERVAL = (2.5, 97.5)  # percentiles
SIGNIFICANT = 0.05
Array = NDArray[np.float64]


@dataclass(frozen=True)
class AuditedLayer:
    """One layer: its measured experts, the changes of the loss without each [n, N], and what criteria gave them [n]."""

    layer: int
    experts: tuple[int, ...]
    changes_nN: Array
    scores: Mapping[str, Array]


def spearman(one: Array, other: Array) -> Array:
    """Spearman's rho over the last axis; 0 where one side is constant, which orders nothing."""
    ranks = [rankdata(values, axis=-1) for values in np.broadcast_arrays(one, other)]
    first, second = (rank - rank.mean(axis=-1, keepdims=True) for rank in ranks)
    scale = np.sqrt((first**2).sum(axis=-1) * (second**2).sum(axis=-1))
    found: Array = np.divide((first * second).sum(axis=-1), scale, out=np.zeros_like(scale), where=scale > 0)
    return found


def kendall(one: Array, other: Array) -> Array:
    """Kendall's tau-b over the last axis; 0 where one side is constant."""
    one, other = np.broadcast_arrays(one, other)
    if one.ndim == 1 and len(one) ** 2 > PAIRS:
        return np.asarray(np.nan_to_num(kendalltau(one, other).statistic))  # without all pairs in memory
    if one.ndim == 1:
        return _kendall(one, other)
    rows = max(1, PAIRS // one.shape[-1] ** 2)
    blocks = [_kendall(one[at : at + rows], other[at : at + rows]) for at in range(0, len(one), rows)]
    return np.concatenate(blocks)


def _kendall(one: Array, other: Array) -> Array:
    """The same by the signs of all pairs, which is faster for many short rows."""
    first, second = (np.sign(values[..., :, None] - values[..., None, :]) for values in (one, other))
    scale = np.sqrt((first**2).sum(axis=(-1, -2)) * (second**2).sum(axis=(-1, -2)))
    found: Array = np.divide((first * second).sum(axis=(-1, -2)), scale, out=np.zeros_like(scale), where=scale > 0)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being several, by Holm's step-down procedure."""
    order = np.argsort(p_values)
    count, largest, corrected = len(order), 0.0, [0.0] * len(order)
    for position, index in enumerate(order):
        largest = max(largest, min(1.0, (count - position) * p_values[index]))
        corrected[index] = largest
    return corrected


def interval(draws_D: Array) -> list[float]:
    """The middle 95 %."""
    return [float(value) for value in np.percentile(draws_D, INTERVAL)]


def agreement(layers: Sequence[AuditedLayer], seed: int) -> dict[str, Any]:
    """All figures of an audit as JSON-able values; the same for the same seed.

    `layers` has the experts with their changes, `criteria` the correlations (best first), `chance` what random scores
    reach, `ceiling` what the noise of the measurement leaves possible.
    """
    rng = np.random.default_rng(seed)
    names = list(layers[0].scores)
    draws = _Draws(layers, rng)
    found = {name: _criterion(name, layers, draws) for name in names}
    overall = holm([found[name]["p"] for name in names])
    cells = holm([cell["p"] for name in names for cell in found[name]["layers"]])
    for position, name in enumerate(names):
        found[name] |= {"p_corrected": overall[position], "better_than_random": overall[position] < SIGNIFICANT}
        own = cells[position * len(layers) : (position + 1) * len(layers)]
        for cell, corrected in zip(found[name]["layers"], own, strict=True):
            cell["p_corrected"] = corrected
    return {
        "layers": [_described(layer, means_Dn) for layer, means_Dn in zip(layers, draws.means_Dn, strict=True)],
        "criteria": sorted(found.values(), key=lambda one: -one["spearman"]),
        "chance": {"spearman_ci": interval(draws.chance_P)},
        "ceiling": _ceiling(layers, rng),
        "random_expert": draws.random_expert(),
    }


class _Draws:
    """The resampled sequences and experts, the same for every criterion, and the reordered changes."""

    def __init__(self, layers: Sequence[AuditedLayer], rng: np.random.Generator) -> None:
        self.layers = layers
        num_sequences = layers[0].changes_nN.shape[1]
        sequences_DN = rng.integers(num_sequences, size=(DRAWS, num_sequences))
        weights_DN = np.stack([np.bincount(row, minlength=num_sequences) for row in sequences_DN]) / num_sequences
        self.means_Dn = [weights_DN @ layer.changes_nN.T for layer in layers]  # of every expert, other texts
        self.experts_Dn = [rng.integers(len(layer.experts), size=(DRAWS, len(layer.experts))) for layer in layers]
        self.changes_Dn = [
            np.take_along_axis(means, experts, axis=1)
            for means, experts in zip(self.means_Dn, self.experts_Dn, strict=True)
        ]
        self.reordered_Pn = [
            rng.permuted(np.tile(layer.changes_nN.mean(axis=1), (PERMUTATIONS, 1)), axis=1) for layer in layers
        ]
        any_order = [np.arange(len(layer.experts), dtype=np.float64) for layer in layers]
        self.chance_P = self.under_chance(any_order).mean(axis=0)

    def under_chance(self, scores: Sequence[Array]) -> Array:
        """rho of every reordering [L, P]."""
        return np.stack([spearman(own, changes) for own, changes in zip(scores, self.reordered_Pn, strict=True)])

    def random_expert(self) -> dict[str, Any]:
        """What an expert drawn at random costs: the mean over all that were measured."""
        draws_D = np.mean([means.mean(axis=1) for means in self.means_Dn], axis=0)
        value = float(np.mean([layer.changes_nN.mean() for layer in self.layers]))
        return {"change": value, "change_ci": interval(draws_D)}


def _described(layer: AuditedLayer, means_Dn: Array) -> dict[str, Any]:
    """A layer's experts with their changes, and intervals over sequences."""
    return {
        "layer": layer.layer,
        "experts": list(layer.experts),
        "changes": layer.changes_nN.mean(axis=1).tolist(),
        "changes_ci": [interval(means_Dn[:, position]) for position in range(len(layer.experts))],
        "scores": {name: values.tolist() for name, values in layer.scores.items()},
    }


def _criterion(name: str, layers: Sequence[AuditedLayer], draws: _Draws) -> dict[str, Any]:
    """One criterion's correlations, by layer and over all, and what its choice costs."""
    scores = [layer.scores[name] for layer in layers]
    changes = [layer.changes_nN.mean(axis=1) for layer in layers]
    drawn = [own[experts] for own, experts in zip(scores, draws.experts_Dn, strict=True)]
    chance_LP = draws.under_chance(scores)
    rho_L = [float(spearman(own, change)) for own, change in zip(scores, changes, strict=True)]
    tau_L = [float(kendall(own, change)) for own, change in zip(scores, changes, strict=True)]
    rho_LD = np.stack([spearman(own, change) for own, change in zip(drawn, draws.changes_Dn, strict=True)])
    tau_LD = np.stack([kendall(own, change) for own, change in zip(drawn, draws.changes_Dn, strict=True)])
    pooled_scores, pooled_changes = np.concatenate(scores), np.concatenate(changes)
    pooled_D = spearman(np.concatenate(drawn, axis=1), np.concatenate(draws.changes_Dn, axis=1))
    return {
        "criterion": name,
        "spearman": float(np.mean(rho_L)),
        "spearman_ci": interval(rho_LD.mean(axis=0)),
        "kendall": float(np.mean(tau_L)),
        "kendall_ci": interval(tau_LD.mean(axis=0)),
        "p": _p(chance_LP.mean(axis=0), float(np.mean(rho_L))),
        "pooled_spearman": float(spearman(pooled_scores, pooled_changes)),
        "pooled_spearman_ci": interval(pooled_D),
        "pooled_kendall": float(kendall(pooled_scores, pooled_changes)),
        "layers": [
            {
                "layer": layer.layer,
                "spearman": rho,
                "spearman_ci": interval(rho_D),
                "kendall": tau,
                "kendall_ci": interval(tau_D),
                "p": _p(chance_P, rho),
            }
            for layer, rho, tau, rho_D, tau_D, chance_P in zip(
                layers, rho_L, tau_L, rho_LD, tau_LD, chance_LP, strict=True
            )
        ],
    } | _lowest(scores, changes, draws)


def _lowest(scores: Sequence[Array], changes: Sequence[Array], draws: _Draws) -> dict[str, Any]:
    """What the lowest-scored measured expert of a layer costs, beside one drawn at random: means over the layers."""
    worst = [int(own.argmin()) for own in scores]
    value = float(np.mean([change[expert] for change, expert in zip(changes, worst, strict=True)]))
    random = float(np.mean([change.mean() for change in changes]))
    gains_D = np.mean(
        [means[:, expert] - means.mean(axis=1) for means, expert in zip(draws.means_Dn, worst, strict=True)], axis=0
    )
    return {"lowest_change": value, "lowest_less_random": value - random, "lowest_less_random_ci": interval(gains_D)}


def _p(chance: Array, value: float) -> float:
    """Share of reorderings that reach the value, itself counted among them; equal up to rounding counts."""
    return float((1 + (chance >= value - 1e-12).sum()) / (1 + len(chance)))


def _ceiling(layers: Sequence[AuditedLayer], rng: np.random.Generator) -> float | None:
    """Mean over layers of rho that a perfect criterion is expected to reach; None for a single sequence."""
    num_sequences = layers[0].changes_nN.shape[1]
    if num_sequences < 2:
        return None
    found = []
    for _ in range(HALVES):
        order = rng.permutation(num_sequences)
        one, other = order[: num_sequences // 2], order[num_sequences // 2 :]
        halves = [
            spearman(layer.changes_nN[:, one].mean(axis=1), layer.changes_nN[:, other].mean(axis=1)) for layer in layers
        ]
        found.append(float(np.mean(halves)))
    half = max(0.0, float(np.mean(found)))
    return float(np.sqrt(2 * half / (1 + half)))
