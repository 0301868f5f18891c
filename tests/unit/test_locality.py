"""Local routing consistency against its definition, spelled out in `tests/naive_locality.py`."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_compress.calibrate.locality import (
    CACHE_RATIOS,
    CACHE_SEGMENT,
    SEGMENTS,
    Locality,
    by_chance,
    cache_hits,
    segment_routing,
    windows,
)
from tests import naive_locality


def sticky(seed: int, *, sequences: int, length: int, num_experts: int, top_k: int) -> NDArray[np.int64]:
    """Routing [N, S, K] in which tokens keep some of the experts of the token before."""
    rng = np.random.default_rng(seed)
    found = np.zeros((sequences, length, top_k), dtype=np.int64)
    for sequence in found:
        current = list(rng.choice(num_experts, top_k, replace=False))
        for token in sequence:
            if rng.random() < 0.6:
                others = [expert for expert in range(num_experts) if expert not in current]
                current[rng.integers(top_k)] = rng.choice(others)
            token[:] = rng.permutation(current)
    return found


@pytest.mark.parametrize("num_experts, top_k", [(6, 2), (8, 1), (5, 4)])
@pytest.mark.parametrize("segment", [1, 3, 16])
def test_segment_routing_is_its_definition(num_experts: int, top_k: int, segment: int) -> None:
    traces = sticky(segment, sequences=3, length=24, num_experts=num_experts, top_k=top_k)
    counts = np.array(naive_locality.windows(traces.tolist(), num_experts, segment), dtype=np.float64)
    found = segment_routing(counts)
    value, ratio = naive_locality.segment_routing(traces.tolist(), num_experts, segment)
    assert found is not None
    assert found.value == pytest.approx(float(value), rel=1e-12)
    assert found.size_ratio == pytest.approx(float(ratio), rel=1e-12)


@pytest.mark.parametrize("num_experts, top_k", [(6, 2), (8, 1), (7, 3)])
@pytest.mark.parametrize("segment", [1, 4, 16])
def test_caches_are_their_definition(num_experts: int, top_k: int, segment: int) -> None:
    traces = sticky(segment, sequences=4, length=40, num_experts=num_experts, top_k=top_k)
    sizes = [top_k, top_k + 1, 2 * top_k]
    found = cache_hits(traces, num_experts, sizes, segment)
    expected = [naive_locality.cache_hits(traces.tolist(), num_experts, size, segment) for size in sizes]
    np.testing.assert_array_equal(found, np.array(expected).T)
    rates = found.sum(axis=0) / traces.size
    assert rates[0] < rates[-1] < 1, "the comparison means something"


def test_a_layer_is_watched_sequence_by_sequence() -> None:
    """No window and no cache reaches from one sequence into the next; batches make no difference."""
    traces = sticky(0, sequences=4, length=30, num_experts=8, top_k=2)
    one, all_at_once = Locality(8, 2), Locality(8, 2)
    for sequence in traces:
        one.add(sequence[None])
    all_at_once.add(traces)
    for locality in (one, all_at_once):
        found = locality.statistics()
        for segment in SEGMENTS:
            np.testing.assert_array_equal(found[windows(segment)], naive_locality.windows(traces.tolist(), 8, segment))
        np.testing.assert_array_equal(found["cache_lookups"], np.bincount(traces.ravel(), minlength=8))
        expected = [naive_locality.cache_hits(traces.tolist(), 8, 2 * ratio, CACHE_SEGMENT) for ratio in CACHE_RATIOS]
        np.testing.assert_array_equal(found["cache_hits"], np.array(expected).T)


def test_slots_without_an_expert_count_for_nothing() -> None:
    traces = sticky(1, sequences=2, length=20, num_experts=6, top_k=2)
    traces[:, ::3, 1] = 6  # a token that uses one expert only
    locality = Locality(6, 2)
    locality.add(traces)
    cut = [[[expert for expert in token if expert < 6] for token in trace] for trace in traces.tolist()]
    found = locality.statistics()
    np.testing.assert_array_equal(found[windows(16)], naive_locality.windows(cut, 6, 16))
    expected = [naive_locality.cache_hits(cut, 6, min(6, 2 * ratio), CACHE_SEGMENT) for ratio in CACHE_RATIOS]
    np.testing.assert_array_equal(found["cache_hits"], np.array(expected).T)


def test_constant_routing_is_perfect_and_unused_experts_have_none() -> None:
    trace = np.tile(np.array([0, 3]), (1, 64, 1))
    locality = Locality(4, 2)
    locality.add(trace)
    found = locality.statistics()
    routing = segment_routing(found[windows(16)])
    assert routing is not None and routing.value == routing.size_ratio == 1.0
    assert found["cache_hits"].sum(axis=0).tolist() == [128.0] * len(CACHE_RATIOS)
    assert segment_routing(found[windows(16)][[1, 2]]) is None


def test_chance_is_what_independent_tokens_reach() -> None:
    """Tokens drawn one by one, with the same probabilities, against the formula."""
    rng = np.random.default_rng(0)
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    trace = np.array([[rng.choice(4, p=shares)] for _ in range(40_000)])
    locality = Locality(4, 1)
    locality.add(trace[None])
    drawn, derived = segment_routing(locality.windows[16]), segment_routing(by_chance(shares, 16))
    assert drawn is not None and derived is not None
    assert derived.value == pytest.approx(drawn.value, rel=0.01)
