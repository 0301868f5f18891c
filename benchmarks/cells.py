"""What the tables in the documents are made of: a benchmark's results, cells and rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TASKS = ("code", "documentation", "facts", "recall", "sort", "reverse", "brackets", "sums")
TEXTS = ("code", "documentation")  # measured in bits per byte, the others by accuracy

Rows = Sequence[Sequence[str]]


def load(name: str) -> dict[str, Any]:
    """The results of a benchmark."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table(header: Sequence[str], rows: Rows) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def score(task: str, value: float) -> str:
    """A task's result with the digits that mean something: four for bits per byte, three for an accuracy."""
    return f"{value:.4f}" if task in TEXTS else f"{value:.3f}"


def scores(tasks: Mapping[str, float], names: Sequence[str] = TASKS) -> list[str]:
    """The results of these tasks, in order."""
    return [score(name, tasks[name]) for name in names]


def short(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The packaged tasks by their short names, each with its one metric."""
    return {name.removeprefix("reference_"): next(iter(metric.values())) for name, metric in tasks.items()}


def span(values: Sequence[float], digits: int) -> str:
    """`1.2996 to 1.3095`."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
