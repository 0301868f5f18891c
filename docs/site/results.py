"""A page for every file in `benchmarks/results/`: what was run, and all that it found, as tables.

Nothing here knows a benchmark by name: a mapping of settings becomes a list of them, mappings or lists of like entries
become a table with one row each, and what is nested in the entries a table of its own.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("name", "op", "calibration", "criterion", "seed")  # what entries of a list may be called by
Flat = dict[str, Any]


def result_pages() -> dict[str, str]:
    """Markdown of each page by the name of its file, which is that of the results."""
    return {file.stem: result_page(file) for file in sorted((BENCHMARKS / "results").glob("*.json"))}


def result_page(file: Path) -> str:
    """Markdown: what the script says of itself, and every figure of its results."""
    script = BENCHMARKS / f"{file.stem.partition('-')[0]}.py"
    about = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    found = json.loads(file.read_text(encoding="utf-8"))
    parts = [f"# {file.stem}", about, f"All figures of [`{file.name}`](results/{file.name}), to five digits."]
    return "\n\n".join([*parts, *_mapping(found, 2)]) + "\n"


def _mapping(content: Mapping[str, Any], level: int) -> Iterator[str]:
    """The content of a mapping: what fits a line as a list, the rest under headings of this level."""
    lines = {key: value for key, value in content.items() if _fits_a_line(value)}
    if lines:
        yield "\n".join(f"* {key}: {_shown(value)}" for key, value in lines.items())
    for key, value in content.items():
        if key in lines:
            continue
        yield f"{'#' * min(level, 6)} {key}"
        entries = _entries(value)
        if entries is not None:
            yield from _tables(entries)
        else:
            yield from _mapping(value, level + 1)


def _fits_a_line(value: Any) -> bool:
    """Whether this is plain, a list of what is plain, or a mapping of such."""
    inside = value.values() if isinstance(value, Mapping) else [value]
    lists = [inner if isinstance(inner, list) else [inner] for inner in inside]
    return not any(isinstance(one, Mapping) for items in lists for one in items)


def _entries(value: Any) -> dict[str, Flat] | None:
    """Entries by name, of a list or of a mapping of mappings that have something in common; else None."""
    if isinstance(value, list):
        named = [(_name(number, entry), entry) for number, entry in enumerate(value, start=1)]
    else:
        named = list(value.items())
    if not all(isinstance(entry, Mapping) for _, entry in named):
        return None
    if len(named) > 1 and not set.intersection(*(set(entry) for _, entry in named)):
        return None
    return dict(named)


def _name(number: int, entry: Any) -> str:
    """What an entry of a list is called: its number, and what it says of itself."""
    own = [str(entry[key]) for key in NAMES if entry.get(key) is not None] if isinstance(entry, Mapping) else []
    return f"{number}. {', '.join(own)}" if own else str(number)


def _tables(entries: Mapping[str, Flat]) -> Iterator[str]:
    """One table of what is plain in the entries, and one for each mapping in them."""
    keys = list(dict.fromkeys(key for entry in entries.values() for key in entry))
    nested = [key for key in keys if any(isinstance(entry.get(key), Mapping) for entry in entries.values())]
    plain = [key for key in keys if key not in nested]
    if plain:
        yield _table(entries, plain)
    for key in nested:
        inside = {name: _flat(entry[key]) for name, entry in entries.items() if isinstance(entry.get(key), Mapping)}
        columns = list(dict.fromkeys(column for entry in inside.values() for column in entry))
        if columns:
            yield f"**{key}**"
            yield _table(inside, columns)


def _table(entries: Mapping[str, Flat], columns: Sequence[str]) -> str:
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(_shown(entry.get(column, "")) for column in columns)] for name, entry in entries.items()]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested keys joined by dots, without what no other tells apart."""
    flat: Flat = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            inner = _flat(value, f"{prefix}{key}.")
            flat |= {f"{prefix}{key}": next(iter(inner.values()))} if len(inner) == 1 else inner
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(value: Any) -> str:
    """A value as a reader wants it: five digits, thousands apart."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.5g}"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items()) or "-"
    return ", ".join(_shown(inner) for inner in value) or "-"
