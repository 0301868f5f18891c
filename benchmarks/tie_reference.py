"""Tying on the built-in model: which part of it matters, and what the bytes cost.

    python -m benchmarks.tie_reference [--folder DIR] [--only TEXT]

Pairs of the four middle layers, as `op: tie` does it by default: taken as they come, matched, fitted, and with a
difference for each expert. Then all layers, in groups of 2, 4 and 8, with differences of as large a rank as leaves 60 %
of the routed experts' bytes. Calibrated and judged as in `merge_reference`. Nothing is distilled.

Results go to `benchmarks/results/tie_reference.json` after every row; rows that are there are kept.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.merge_reference import Row, main

RESULTS = Path(__file__).parent / "results" / "tie_reference.json"
ALL = {"prelude": 0, "coda": 0}
RANKS = {2: 6, 4: 24, 8: 33}  # group size -> rank at 60 % of the experts' bytes


def steps() -> dict[str, Row]:
    """Name -> the step of a row."""
    tie = {"op": "tie"}
    naive = tie | {"match": False, "align": False, "fit": "average"}
    found: dict[str, Row] = {
        "pairs: average": naive,
        "pairs: average, neurons aligned": naive | {"align": "weights"},
        "pairs: matched by weights": naive | {"align": "weights", "match": "weights"},
        "pairs: matched by output": naive | {"align": "weights", "match": "output"},
        "pairs: fitted in closed form": tie,
        "pairs: fitted by gradient": tie | {"fit": "gradient"},
        "pairs: rank 8, not matched, average": naive | {"residual_rank": 8},
        "pairs: rank 8": tie | {"residual_rank": 8},
        "pairs: rank 8, fitted by gradient": tie | {"residual_rank": 8, "fit": "gradient"},
        "pairs: rank 16": tie | {"residual_rank": 16},
    }
    found |= {
        f"all layers in groups of {size}, rank {rank}": tie | ALL | {"group_size": size, "residual_rank": rank}
        for size, rank in RANKS.items()
    }
    return found


if __name__ == "__main__":
    main(RESULTS, steps(), __doc__)
