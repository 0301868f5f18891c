"""Local routing consistency (arXiv 2505.16056) word by word: sets, lists and loops, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Trace = Sequence[Sequence[int]]  # the experts of one token after the other


def windows(traces: Sequence[Trace], num_experts: int, segment: int) -> list[list[int]]:
    """For every expert the windows of `segment` tokens in which 0, 1, ... of them use it."""
    counts = [[0] * (segment + 1) for _ in range(num_experts)]
    for trace in traces:
        for start in range(len(trace) - segment + 1):
            for expert in range(num_experts):
                counts[expert][sum(expert in token for token in trace[start : start + segment])] += 1
    return counts


def segment_routing(traces: Sequence[Trace], num_experts: int, segment: int) -> tuple[Fraction, Fraction]:
    """The best F1 of fixed sets of experts, one for each window, and how many experts they pick per expert used.

    Every decision (window, token, expert) is looked at: picked or not, used or not.
    """
    best = (Fraction(0), Fraction(0))
    for threshold in range(segment + 1):
        both = picked = used = 0
        for trace in traces:
            for start in range(len(trace) - segment + 1):
                tokens = trace[start : start + segment]
                chosen = {
                    expert
                    for expert in range(num_experts)
                    if sum(expert in token for token in tokens) >= threshold
                }  # fmt: skip
                for token in tokens:
                    both += len(chosen & set(token))
                    picked += len(chosen)
                    used += len(token)
        f1 = Fraction(2 * both, picked + used)
        best = max(best, (f1, Fraction(picked, used)), key=lambda found: found[0])
    return best


def cache_hits(traces: Sequence[Trace], num_experts: int, size: int, segment: int) -> list[int]:
    """How often each expert is found in a cache of `size` experts that knows the next `segment` tokens."""
    hits = [0] * num_experts
    for trace in traces:
        resident: list[int] = []  # the least recently used first
        room = size
        for position, token in enumerate(trace):
            coming = [expert for later in trace[position + 1 : position + 1 + segment] for expert in later]
            missing = [expert for expert in token if expert not in resident]
            for expert in token:
                if expert in resident:
                    hits[expert] += 1
            # the token's experts are the most recent, in their order, those let in only now among them
            order = [expert for expert in resident if expert not in token] + list(token)
            for expert in missing:
                if room:
                    room -= 1
                    hits[expert] += 1
                else:
                    fewest = min(coming.count(other) for other in resident)
                    gone = next(other for other in order if other in resident and coming.count(other) == fewest)
                    resident.remove(gone)
                resident.append(expert)
            resident = [expert for expert in order if expert in resident]
    return hits
