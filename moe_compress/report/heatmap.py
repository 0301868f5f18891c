"""Maps of experts as drawings: which cell has which colour, and the legend. Geometry only; the template draws.

A cell is a unit square at (expert, row). Cells of one colour are one path, so that a model of 60 layers with 256
experts is some ten paths and not 15,000 rectangles.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from moe_compress.report.experts import KEEP, OUTCOMES, ExpertMap, width_text
from moe_compress.report.tables import Formatter
from moe_compress.text import format_percent

SHADES = 7  # of an amount, light to dark
SKEWED = 10.0  # largest amount over the median, beyond which shades are multiples and not differences
WIDEST = 1e4  # of shades that are multiples, the largest amount over what the lightest begins with
GAPS_UP_TO = 64  # experts: beyond, cells would be too narrow for gaps
GAP = 0.06
# Colours of outcomes by name, of other words in order; `style.css` has them.
OUTCOME_CLASSES = dict(zip(OUTCOMES, ("kept", "super", "merged", "gone", "merged"), strict=True))
WORDS = 8


@dataclass(frozen=True)
class Shade:
    """Cells of one colour: the class of `style.css`, the path, and what the legend says of it."""

    name: str
    path: str
    label: str
    count: int


@dataclass(frozen=True)
class HeatMap:
    """One drawing. `scale` says how the legend reads: "words", or "amounts" with `low` and `high` at its ends."""

    title: str
    note: str
    provenance: str
    scale: str
    shades: tuple[Shade, ...]
    low: str = ""
    high: str = ""
    spacing: str = ""


@dataclass(frozen=True)
class HeatMaps:
    """All drawings of one result, and what a reader learns of each expert."""

    layers: tuple[int, ...]
    columns: int
    maps: tuple[HeatMap, ...]
    marks: str  # small squares in the cells of experts that are gone, for all maps
    facts: tuple[dict[str, Any], ...]  # {"title", "texts": [row][expert]}


def heat_maps(maps: Sequence[ExpertMap], survivors: Mapping[int, Collection[int]]) -> HeatMaps | None:
    """The drawings of these maps; None when there are none."""
    layers = sorted({layer for one in maps for layer in one.values})
    if not layers:
        return None
    columns = max(len(row) for one in maps for row in one.values.values())
    gap = GAP if columns <= GAPS_UP_TO else 0.0
    gone = [
        (row, expert)
        for row, layer in enumerate(layers)
        for expert in range(_size(maps, layer))
        if layer in survivors and expert not in survivors[layer]
    ]
    marks = "".join(f"M{expert + 0.36:g} {row + 0.36:g}h.28v.28h-.28z" for row, expert in gone)
    drawn = tuple(_words(one, layers, gap) if one.labels else _amounts(one, layers, gap) for one in maps if one.drawn)
    facts = tuple(
        {"title": one.title, "texts": [one.texts.get(layer, []) for layer in layers]}
        for one in sorted(maps, key=lambda one: not one.labels)
    )
    return HeatMaps(tuple(layers), columns, drawn, marks, facts)


def _size(maps: Sequence[ExpertMap], layer: int) -> int:
    return max(len(one.values.get(layer, ())) for one in maps)


def _words(one: ExpertMap, layers: Sequence[int], gap: float) -> HeatMap:
    """A colour for each word, in their order."""
    cells: dict[int, list[tuple[int, int]]] = {}
    for row, layer in enumerate(layers):
        for expert, value in enumerate(one.values.get(layer, ())):
            if value is not None:
                cells.setdefault(int(value), []).append((row, expert))
    widths = _ordered_widths(one.labels)
    shades = []
    for value in sorted(cells):
        label = one.labels[value]
        name = OUTCOME_CLASSES.get(label) or widths.get(label) or f"word{value % WORDS}"
        text = width_text(label) if label in widths else label
        shades.append(Shade(name, _path(cells[value], gap), text, len(cells[value])))
    return HeatMap(one.title, one.note, one.provenance, "words", tuple(shades))


def _ordered_widths(labels: Sequence[str]) -> dict[str, str]:
    """Shades for labels that are widths in bits, evenly from few to all; what is no width has a colour of its own."""
    if not any(label.isdigit() for label in labels):
        return {}
    bits = [label for label in labels if label.isdigit() or label == KEEP]
    step = (SHADES - 1) / max(1, len(bits) - 1)
    return {label: f"shade{round(place * step)}" for place, label in enumerate(bits)}


def _amounts(one: ExpertMap, layers: Sequence[int], gap: float) -> HeatMap:
    """Shades from the smallest to the largest amount; of a map `by_layer`, shares of the layer's largest."""
    table: dict[tuple[int, int], float] = {}
    for row, layer in enumerate(layers):
        known = [value for value in one.values.get(layer, ()) if value is not None]
        largest = max(map(abs, known), default=0.0) if one.by_layer else 1.0
        for expert, value in enumerate(one.values.get(layer, ())):
            if value is not None:
                table[row, expert] = value / (largest or 1.0)
    low, high = min(table.values()), max(table.values())
    multiples = low >= 0 and high > SKEWED * median(table.values())
    floor = max(min((value for value in table.values() if value > 0), default=1.0), high / WIDEST)
    cells: dict[int, list[tuple[int, int]]] = {}
    for place, value in table.items():
        if multiples:
            share = math.log(max(value, floor) / floor) / math.log(high / floor)
        else:
            share = (value - low) / (high - low) if high > low else 0.5
        cells.setdefault(min(int(share * SHADES), SHADES - 1), []).append(place)
    shades = tuple(
        Shade(f"shade{shade}", _path(cells.get(shade, []), gap), "", len(cells.get(shade, [])))
        for shade in range(SHADES)
    )
    show = format_percent if one.by_layer else _shown(one)
    spacing = "each shade a multiple of the one before" if multiples else ""
    return HeatMap(one.title, one.note, one.provenance, "amounts", shades, show(low), show(high), spacing)


def _shown(one: ExpertMap) -> Formatter:
    """How an amount of this map is written: as its texts are, a share or a number."""
    texts = [text for row in one.texts.values() for text in row if text]
    return format_percent if all(text.endswith("%") for text in texts) else "{:.3g}".format


def _path(cells: Sequence[tuple[int, int]], gap: float) -> str:
    """Squares with gaps between them; without gaps, neighbours in a row are one rectangle."""
    if gap:
        side = f"{1 - 2 * gap:g}"
        return "".join(f"M{expert + gap:g} {row + gap:g}h{side}v{side}h-{side}z" for row, expert in cells)
    runs: list[list[int]] = []
    for row, expert in sorted(cells):
        if runs and runs[-1][0] == row and runs[-1][1] + runs[-1][2] == expert:
            runs[-1][2] += 1
        else:
            runs.append([row, expert, 1])
    return "".join(f"M{expert} {row}h{length}v1h-{length}z" for row, expert, length in runs)
