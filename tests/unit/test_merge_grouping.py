"""Groupings against scipy's own cut, brute force, and rules written out in loops."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage

from moe_compress.compress.merge import grouping
from moe_compress.compress.merge.grouping import Array, Labels


def partition(labels: Labels) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}


def average_linkage(points: Array, count: int) -> set[frozenset[int]]:
    """Join the two groups whose members are nearest on average, until `count` are left."""
    found = [frozenset([index]) for index in range(len(points))]

    def apart(pair: tuple[frozenset[int], frozenset[int]]) -> float:
        return float(np.mean([np.linalg.norm(points[i] - points[j]) for i in pair[0] for j in pair[1]]))

    while len(found) > count:
        left, right = min(combinations(found, 2), key=apart)
        found = [one for one in found if one not in (left, right)] + [left | right]
    return set(found)


@pytest.mark.parametrize("count", [1, 2, 5, 11, 12])
def test_hierarchical_against_brute_force_and_scipy(count: int) -> None:
    points = np.random.default_rng(3).normal(size=(12, 7))
    found = grouping.hierarchical(points, count)
    assert partition(found) == average_linkage(points, count)
    assert partition(found) == partition(fcluster(linkage(points, "average"), count, "maxclust"))


def test_hierarchical_finds_known_clusters_in_any_order() -> None:
    rng = np.random.default_rng(0)
    centres = 100 * rng.normal(size=(4, 6))
    membership = np.array([2, 0, 3, 1, 1, 0, 2, 3, 3, 0])
    found = grouping.hierarchical(centres[membership] + 0.1 * rng.normal(size=(10, 6)), 4)
    assert partition(found) == partition(membership)
    assert grouping.members(found) == [[0, 6], [1, 5, 9], [2, 7, 8], [3, 4]]


def test_hierarchical_makes_as_many_groups_as_asked_of_equal_points() -> None:
    assert len(partition(grouping.hierarchical(np.zeros((6, 3)), 4))) == 4


def test_by_router() -> None:
    rng = np.random.default_rng(1)
    similarity, used = rng.normal(size=(9, 9)), rng.permutation(9).astype(float)
    found = grouping.by_router(similarity, used, 4)
    leads = sorted(range(9), key=lambda expert: -used[expert])[:4]
    expected: dict[int, set[int]] = {lead: {lead} for lead in leads}
    for expert in range(9):
        if expert not in leads:
            expected[max(leads, key=lambda lead: similarity[expert, lead])].add(expert)
    assert partition(found) == {frozenset(group) for group in expected.values()}


def test_around_centroids() -> None:
    rng = np.random.default_rng(2)
    distance, saliency = rng.random((10, 10)), rng.permutation(10).astype(float)
    found = grouping.around_centroids(distance, saliency, 4, 3)
    centroids = sorted(range(10), key=lambda expert: -saliency[expert])[:4]
    free = set(range(10)) - set(centroids)
    expected = []
    for centroid in centroids:
        nearest = sorted(free, key=lambda expert: distance[centroid, expert])[:2]
        free -= set(nearest)
        expected.append(frozenset([centroid, *nearest]))
    assert partition(found) == set(expected)
    assert max(len(group) for group in partition(found)) <= 3


def test_one_group_takes_all_when_it_may() -> None:
    distance = np.abs(np.arange(6)[:, None] - np.arange(6)[None, :]).astype(float)
    found = grouping.around_centroids(distance, np.array([0, 0, 9, 0, 8, 0.0]), 2, 16)
    assert partition(found) == {frozenset([0, 1, 2, 3, 5]), frozenset([4])}


def test_cosines_and_joint_distance() -> None:
    rng = np.random.default_rng(4)
    outputs, logits = rng.normal(size=(5, 8)), rng.normal(size=(30, 5))
    outputs[3] = 0
    distance = grouping.joint_distance(outputs @ outputs.T, logits.T @ logits)
    for i, j in combinations(range(5), 2):
        norms = np.linalg.norm(outputs[i]) * np.linalg.norm(outputs[j])
        alike = outputs[i] @ outputs[j] / norms if norms else 0.0
        gates = logits[:, i] @ logits[:, j] / np.linalg.norm(logits[:, i]) / np.linalg.norm(logits[:, j])
        assert distance[i, j] == pytest.approx(1 - ((1 + alike) / 2 + (1 + gates) / 2) / 2)
        assert distance[j, i] == pytest.approx(distance[i, j])
    assert np.diagonal(distance) == pytest.approx(np.zeros(5))
