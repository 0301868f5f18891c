"""Which experts of a layer are put together: numbers in, labels out, no torch.

Every function returns the group of each expert, int [E], groups numbered by their lowest member.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import cut_tree, linkage

Array = NDArray[np.float64]
Labels = NDArray[np.intp]


def hierarchical(outputs_EH: Array, count: int) -> Labels:
    """Agglomerative clustering with average linkage and Euclidean distance (HC-SMoE, arXiv 2410.08589).

    `outputs_EH` is each expert's mean output over all tokens.
    """
    if count == len(outputs_EH):
        return np.arange(count)
    merges = linkage(outputs_EH, method="average", metric="euclidean")
    return _by_lowest_member(cut_tree(merges, n_clusters=count)[:, 0])


def by_router(similarity_EE: Array, saliency_E: Array, count: int) -> Labels:
    """The `count` most used experts, every other one with the most similar of them (M-SMoE, arXiv 2310.01334).

    Equal similarities go to the more used one, equal uses to the lower index.
    """
    dominant = _highest(saliency_E, count)
    labels = np.argmax(similarity_EE[:, dominant], axis=1)
    labels[dominant] = np.arange(count)
    return _by_lowest_member(labels)


def around_centroids(distance_EE: Array, saliency_E: Array, count: int, max_size: int) -> Labels:
    """The `count` most salient experts take their nearest unassigned ones in turn (REAM, arXiv 2604.04356).

    The most salient centroid takes until its group has `max_size` members, then the next one. What is left when
    the last one is full cannot be: `max_size * count` is at least E.
    """
    num_experts = len(saliency_E)
    assert max_size * count >= num_experts, "the plan has checked it"
    centroids = _highest(saliency_E, count)
    labels = np.full(num_experts, -1)
    labels[centroids] = np.arange(count)
    for label, centroid in enumerate(centroids):
        nearest = np.argsort(distance_EE[centroid], kind="stable")
        free = nearest[labels[nearest] < 0]
        labels[free[: max_size - 1]] = label
    return _by_lowest_member(labels)


def cosines(gram_EE: Array) -> Array:
    """Cosines of vectors whose inner products these are; 0 for a vector of zeros, 1 with itself."""
    norms = np.sqrt(np.maximum(np.diagonal(gram_EE), 0.0))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    found: Array = gram_EE * scale[:, None] * scale[None, :]
    np.fill_diagonal(found, 1.0)
    return found


def joint_distance(output_gram_EE: Array, router_gram_EE: Array) -> Array:
    """1 minus the mean of two similarities, each (1 + cosine) / 2: of gated outputs, and of router logits."""
    similarity = (2 + cosines(output_gram_EE) + cosines(router_gram_EE)) / 4
    distance: Array = 1 - similarity
    return distance


def members(labels: Sequence[int] | Labels) -> list[list[int]]:
    """The experts of each group, ascending."""
    found = np.asarray(labels)
    return [np.flatnonzero(found == label).tolist() for label in range(int(found.max()) + 1)]


def _highest(values_E: Array, count: int) -> Labels:
    """The indices of the highest values, highest first; of equal ones the lower index first."""
    return np.argsort(-values_E, kind="stable")[:count]


def _by_lowest_member(labels: Labels) -> Labels:
    """The same groups, numbered in the order in which they first appear."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.intp)
    order[np.argsort(first)] = np.arange(len(first))
    renumbered: Labels = order[inverse]
    return renumbered
