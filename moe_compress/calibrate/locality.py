"""Local routing consistency: whether tokens near each other use the same experts (arXiv 2505.16056). No torch.

Segment routing (SRP): of all windows of m tokens in a row, a fixed set of experts stands in for the router, an expert
being in the set when at least tau of the window's tokens use it. With hist(c) the windows in which c tokens use an
expert, M = sum over c >= tau of c hist(c), P = m times sum over c >= tau of hist(c) and A = sum of c hist(c), the
agreement is F1 = 2M / (P + A) and SRP its maximum over tau, one for all experts whose histograms are added up.

Segment cache (SCH): a cache of c experts in a layer sees one token after the other. All experts of a token are looked
up before any is let in; a missing one takes the place of the resident that the next m tokens use least, the least
recently used of equals. What comes while there is room counts as a hit: the cache is taken to be full from the start.

Not covered: one cache for all layers, and what a real cache, which does not know the next tokens, would reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEGMENTS = (16, 64)  # tokens of the windows
CACHE_SEGMENT = 16  # tokens the cache looks ahead
CACHE_RATIOS = (1, 2, 3)  # experts a cache holds in each layer, in multiples of those a token uses
CACHE_TOKENS = 4096  # of those seen first, the caches are tried on so many
Array = NDArray[np.float64]


def windows(segment: int) -> str:
    """The statistic [E, segment + 1] with the windows of so many tokens, by how many of them use the expert."""
    return f"windows_{segment}"


class Locality:
    """Watches the routing of one MoE layer."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        self.num_experts, self.top_k = num_experts, top_k
        self.windows = {segment: np.zeros((num_experts, segment + 1)) for segment in SEGMENTS}
        self._traces: list[NDArray[np.int64]] = []

    def add(self, index_BSK: NDArray[np.int64]) -> None:
        """Count the experts chosen in some sequences; an index of `num_experts` or more is none."""
        for index_SK in index_BSK:
            self._count(index_SK)
            if sum(len(trace) for trace in self._traces) < CACHE_TOKENS:
                self._traces.append(index_SK)

    def statistics(self) -> dict[str, Array]:
        """The windows, and of the tokens the caches were tried on how often each expert was looked up and found.

        `cache_lookups` [E], and `cache_hits` [E, R] for the sizes of `CACHE_RATIOS`.
        """
        lookups, hits = np.zeros(self.num_experts), np.zeros((self.num_experts, len(CACHE_RATIOS)))
        for length in {len(trace) for trace in self._traces}:
            trace_NSK = np.stack([trace for trace in self._traces if len(trace) == length])
            lookups += np.bincount(trace_NSK.ravel(), minlength=self.num_experts)[: self.num_experts]
            sizes = [min(self.num_experts, ratio * self.top_k) for ratio in CACHE_RATIOS]
            hits += cache_hits(trace_NSK, self.num_experts, sizes, CACHE_SEGMENT)
        found = {windows(segment): counts for segment, counts in self.windows.items()}
        return found | {"cache_lookups": lookups, "cache_hits": hits}

    def _count(self, index_SK: NDArray[np.int64]) -> None:
        chosen_SE = np.zeros((len(index_SK) + 1, self.num_experts + 1), dtype=np.int64)
        np.put_along_axis(chosen_SE[1:], np.minimum(index_SK, self.num_experts), 1, axis=1)
        before_SE = chosen_SE[:, :-1].cumsum(axis=0)  # tokens that used the expert before this one
        for segment, counts_EC in self.windows.items():
            used_WE = before_SE[segment:] - before_SE[:-segment]
            cells = used_WE + np.arange(self.num_experts) * (segment + 1)
            counts_EC += np.bincount(cells.ravel(), minlength=counts_EC.size).reshape(counts_EC.shape)


@dataclass(frozen=True)
class SegmentRouting:
    """SRP, the tau that it is reached with, and the experts the fixed set holds per expert that a token uses."""

    value: float
    threshold: int
    size_ratio: float


def segment_routing(windows_EC: Array) -> SegmentRouting | None:
    """SRP of the experts whose windows are the rows, all with one tau; None where no expert was used."""
    counts_C = windows_EC.sum(axis=0)
    segment = len(counts_C) - 1
    used_C = np.arange(segment + 1) * counts_C
    matches, picked = used_C[::-1].cumsum()[::-1], segment * counts_C[::-1].cumsum()[::-1]
    total = used_C.sum()
    if not total:
        return None
    agreement = 2 * matches / (picked + total)
    best = int(agreement.argmax())
    return SegmentRouting(float(agreement[best]), best, float(picked[best] / total))


def by_chance(share_E: Array, segment: int) -> Array:
    """Windows [E, segment + 1], as shares, of experts that every token uses with these probabilities by itself."""
    from scipy.stats import binom

    found: Array = binom.pmf(np.arange(segment + 1), segment, share_E[:, None])
    return found


def cache_hits(trace_NSK: NDArray[np.int64], num_experts: int, sizes: list[int], segment: int) -> Array:
    """How often each expert is found [E, R] when caches of R `sizes` see N sequences of S tokens with K experts each.

    Every sequence begins with caches of its own. Sizes are K at least; an index of `num_experts` or more is no expert.
    """
    num_sequences, length = trace_NSK.shape[:2]
    caches = _Caches(num_sequences, num_experts, sizes)
    chosen_NSE = np.zeros((num_sequences, length + 1, num_experts + 1), dtype=np.int32)
    np.put_along_axis(chosen_NSE[:, 1:], np.minimum(trace_NSK, num_experts), 1, axis=2)
    before_NSE = chosen_NSE[:, :, :-1].cumsum(axis=1)
    for token in range(length):
        ahead = min(length, token + 1 + segment)
        caches.token(trace_NSK[:, token], before_NSE[:, ahead] - before_NSE[:, token + 1])
    return caches.hits_ER


class _Caches:
    """Caches of several sizes for each of several sequences, all at the same token."""

    def __init__(self, num_sequences: int, num_experts: int, sizes: list[int]) -> None:
        self.resident_NRE = np.zeros((num_sequences, len(sizes), num_experts), dtype=bool)
        self.free_NR = np.tile(np.asarray(sizes), (num_sequences, 1))
        self.used_at_NE = np.zeros((num_sequences, num_experts), dtype=np.int64)
        self.hits_ER = np.zeros((num_experts, len(sizes)))
        self._clock = 0

    def token(self, index_NK: NDArray[np.int64], future_NE: NDArray[Any]) -> None:
        """Look up the experts of a token, then let the missing ones in; `future_NE` counts the coming uses."""
        num_experts = self.hits_ER.shape[0]
        found_KNR = []
        for index_N in index_NK.T:
            known = np.flatnonzero(index_N < num_experts)
            found_NR = np.ones(self.free_NR.shape, dtype=bool)
            found_NR[known] = self.resident_NRE[known, :, index_N[known]]
            found_KNR.append(found_NR)
            self._clock += 1
            self.used_at_NE[known, index_N[known]] = self._clock
        for index_N, found_NR in zip(index_NK.T, found_KNR, strict=True):
            sequences, caches = np.nonzero(~found_NR)
            room = self.free_NR[sequences, caches] > 0
            if not room.all():
                self._evict(sequences[~room], caches[~room], future_NE)
            self.free_NR[sequences[room], caches[room]] -= 1
            self.resident_NRE[sequences, caches, index_N[sequences]] = True
            found_NR[sequences[room], caches[room]] = True
            known = index_N < num_experts
            np.add.at(self.hits_ER, index_N[known], found_NR[known])

    def _evict(self, sequences: NDArray[np.intp], caches: NDArray[np.intp], future_NE: NDArray[Any]) -> None:
        order_NE = future_NE.astype(np.int64) * (self._clock + 1) + self.used_at_NE
        keys = np.where(self.resident_NRE[sequences, caches], order_NE[sequences], np.iinfo(np.int64).max)
        self.resident_NRE[sequences, caches, keys.argmin(axis=1)] = False
