"""What the documents say to type and to set exists."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from benchmarks.tables import documents
from docs.site.recipe_reference import recipe_reference
from docs.site.results import result_pages
from moe_compress.compress.prune.config import ACCUMULATED_SUMS
from moe_compress.recipe import Recipe
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


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """In the repository, where they are read without the site; `make docs` judges those of the site."""
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", document.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def anchors(file: Path) -> set[str]:
    """The headings of a Markdown file as links name them."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_has_a_place_in_the_navigation() -> None:
    """One line in `mkdocs.yml` for a new page; `make docs` asks for it too, but not that it is the only one."""
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = sorted(file.name for file in (ROOT / "docs").glob("*.md"))
    assert pages == sorted({*listed} - {"contributing.md", "changelog.md"}), "give the page a line in mkdocs.yml"
    assert len(listed) == len(set(listed)), "each page has one line"


def models(found: Any) -> Iterator[type[BaseModel]]:
    """The settings classes in a type, and in the fields of these."""
    if isinstance(found, type) and issubclass(found, BaseModel):
        yield found
        for field in found.model_fields.values():
            yield from models(field.annotation)
    for inner in get_args(found):
        yield from models(inner)


def test_the_recipe_reference_has_every_setting_with_a_meaning() -> None:
    sections = re.split(r"^## ", recipe_reference(), flags=re.MULTILINE)[1:]
    assert len(sections) == len(set(models(Recipe)))
    for model in models(Recipe):
        (section,) = (
            one
            for one in sections
            if f"{{ #{model.__name__.lower()} }}" in one or (model is Recipe and one.startswith("The top level"))
        )
        rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", section, re.MULTILINE)
        assert [row[0] for row in rows] == list(model.model_fields)
        assert all(cell.strip() for row in rows for cell in row)
        required = {name for name, field in model.model_fields.items() if field.is_required()}
        assert {row[0] for row in rows if row[2] == "required"} == required


def figures(content: Any) -> Iterator[float]:
    """All numbers in a JSON content."""
    if isinstance(content, dict | list):
        for inner in content.values() if isinstance(content, dict) else content:
            yield from figures(inner)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield content


def test_the_pages_of_results_have_every_figure() -> None:
    for name, page in result_pages().items():
        content = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        shown = {float(number.replace(",", "")) for number in re.findall(r"-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?", page)}
        missing = {value for value in figures(content) if not any(close(value, other) for other in shown)}
        assert not missing, name


def close(value: float, other: float) -> bool:
    """Equal to five digits."""
    return abs(value - other) <= 5e-5 * abs(value)
