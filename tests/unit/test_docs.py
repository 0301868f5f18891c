"""What the documents say to type and to set exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from moe_compress.compress.prune.config import ACCUMULATED_SUMS
from moe_compress.reference.train import SEQUENCE_LENGTH, Settings

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if "argparse" in path.read_text(encoding="utf-8")  # not the parts that another script runs
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_benchmarks_say_how_they_run(script: Path) -> None:
    """As modules: `benchmarks` is a package, which a file run by its path cannot import."""
    described = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    assert re.findall(r"^ *python (\S+ ?\S*)", described, re.MULTILINE) == [f"-m benchmarks.{script.stem}"]


def test_accumulated_pairs_are_listed() -> None:
    text = (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if "(2, 2)" in line)
    assert {(int(a), int(b)) for a, b in re.findall(r"\((\d), (\d)\)", line)} == set(ACCUMULATED_SUMS)


def test_reference_card_names_the_command_that_trained_it() -> None:
    card = (ROOT / "moe_compress" / "reference" / "checkpoint" / "README.md").read_text(encoding="utf-8")
    (tokens,) = re.findall(r"reference\.train OUT --tokens (\d+)`", card)
    (steps, rows) = re.findall(r"([\d,]+) steps of (\d+) rows", card)[0]
    settings = Settings(tokens=int(tokens))
    assert settings.steps == int(steps.replace(",", "")) and settings.batch_rows == int(rows)
    assert int(tokens) == settings.steps * settings.batch_rows * SEQUENCE_LENGTH
