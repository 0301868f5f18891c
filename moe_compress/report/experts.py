"""What a finished folder keeps of every routed expert, and the maps (layer by expert) that a page draws of it.

`experts.json` holds of the scores what has one number per expert and helps a reader:

    {"format": 1, "steps": [null, {"layers": [{"layer", "num_experts", "num_tokens",
                                               "statistics": {"tokens": [E], "gate_sum": [E], ...}}]}]}

`null` is a step that measured nothing. Everything else is read from the plans by their structure, not by the names of
operations. Of a layer's entry in `plan.json`, as far as it is there:

* `keep`: the experts that stay, or `groups`: for each new expert, those that it is made of; `protected`: super experts;
* `scores`: what the choice was made by, for every expert;
* `options`: projection -> width of every expert that stays.

An operation with more to show (whom an expert follows, how often it is skipped) writes `maps` into its plan, and
they are drawn as they are: [{"title", "note", "provenance", "values": {layer: [E]}, "labels": [...], "share": true,
"drawn": false}], where labels, if there are any, make the values indices into them, shares are shown in per cent, and
what is not drawn (a number of something) is read when an expert is pointed at. Values that are null are experts that
the map says nothing about.

All maps are over the experts of the source model: of a later step they are led back through the steps before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_compress.calibrate.scores import ABLATION, Scores
from moe_compress.text import format_number, format_percent

FORMAT = 1
EXPERTS_FILE = "experts.json"
KEPT = ("tokens", "gate_sum", "norm_sum", "max_abs")
KEEP = "keep"  # the width of an expert that stays as it is
ERROR = "relative_error.expert."  # output error of one width, measured with the expert alone at it
DIGITS = 7  # significant, of what is kept

Plan = Mapping[str, Any]
Values = dict[int, list[Any]]  # layer -> one value per expert
OUTCOMES = ("kept", "kept, a super expert", "merged", "dropped", "kept as a difference")


@dataclass(frozen=True)
class ExpertMap:
    """One number, or one of a few words (`labels`), for every expert: `values` by layer, None where there is nothing.

    `texts` is what a reader sees of a value. `by_layer`: only values of one layer compare. Not `drawn` are figures that
    are worth reading but not a map of their own. `provenance` is "measured", "derived" or "decided".
    """

    title: str
    note: str
    provenance: str
    values: Values
    texts: dict[int, list[str]]
    labels: tuple[str, ...] = ()
    by_layer: bool = False
    drawn: bool = True


def expert_statistics(folders: Sequence[Path]) -> dict[str, Any]:
    """The content of `experts.json`; `folders` are where the steps keep their scores, there or not."""
    return {"format": FORMAT, "steps": [_kept(folder) for folder in folders]}


def _kept(folder: Path) -> dict[str, Any] | None:
    if not (folder / "scores.json").exists():
        return None
    layers = []
    for layer in Scores.load(folder, only=lambda name: name in KEPT or name.startswith(ERROR)).layers:
        layers.append({
            "layer": layer.layer,
            "num_experts": layer.num_experts,
            "num_tokens": layer.num_tokens,
            "statistics": {name: [_short(value) for value in row] for name, row in layer.statistics.items()},
        })  # fmt: skip
    return {"layers": layers}


def _short(value: float) -> float | int | None:
    """As few digits as a reader needs, whole numbers as such; None for what JSON cannot hold."""
    short = float(f"{value:.{DIGITS}g}")
    if short != short or abs(short) == float("inf"):
        return None
    return int(short) if short.is_integer() else short


def expert_maps(plans: Sequence[Plan], statistics: Sequence[Any]) -> list[ExpertMap]:
    """Every map of every step, over the experts of the source model."""
    found: list[ExpertMap] = []
    origins: dict[int, list[list[int]]] = {}  # layer -> for each expert of today, those of the source it is made of
    counts: dict[int, int] = {}
    for number, plan in enumerate(plans):
        entries = [entry for entry in plan.get("layers", ()) if "num_experts" in entry]
        for entry in entries:
            counts.setdefault(entry["layer"], entry["num_experts"])
            origins.setdefault(entry["layer"], [[expert] for expert in range(entry["num_experts"])])
        measured = statistics[number] if number < len(statistics) else None
        for one in _maps_of_step(plan, entries, (measured or {}).get("layers", ())):
            title = f"Step {number + 1}: {one.title[:1].lower()}{one.title[1:]}" if len(plans) > 1 else one.title
            found.append(replace(_led_back(one, origins, counts), title=title))
        for entry in entries:
            made_of = _made_of(entry)
            origins[entry["layer"]] = [
                [source for expert in group for source in origins[entry["layer"]][expert]] for group in made_of
            ]
    return [one for one in found if any(value is not None for row in one.values.values() for value in row)]


def survivors(plans: Sequence[Plan]) -> dict[int, set[int]]:
    """Layer -> the experts of the source model that are in the result, alone or merged."""
    alive: dict[int, list[list[int]]] = {}
    for plan in plans:
        for entry in plan.get("layers", ()):
            if "num_experts" in entry:
                before = alive.get(entry["layer"]) or [[expert] for expert in range(entry["num_experts"])]
                alive[entry["layer"]] = [[s for e in group for s in before[e]] for group in _made_of(entry)]
    return {layer: {source for group in groups for source in group} for layer, groups in alive.items()}


def _made_of(entry: Plan) -> list[list[int]]:
    """For each expert after a step, the experts before it that it is made of."""
    if "groups" in entry:
        return [list(group) for group in entry["groups"]]
    return [[expert] for expert in entry.get("keep", range(entry["num_experts"]))]


def _led_back(one: ExpertMap, origins: Mapping[int, list[list[int]]], counts: Mapping[int, int]) -> ExpertMap:
    """A map over a step's own experts as one over the source's."""
    values: Values = {}
    texts: dict[int, list[str]] = {}
    for layer, row in one.values.items():
        size = counts.get(layer, len(row))
        groups = origins.get(layer) or [[expert] for expert in range(len(row))]
        values[layer], texts[layer] = [None] * size, [""] * size
        for group, value, text in zip(groups, row, one.texts[layer], strict=True):
            for source in group:
                values[layer][source], texts[layer][source] = value, text
    return replace(one, values=values, texts=texts)


def _maps_of_step(plan: Plan, entries: Sequence[Plan], layers: Sequence[Any]) -> Iterator[ExpertMap]:
    """All that is known of the experts of one step, over its own experts."""
    yield from _outcome(entries)
    yield from _widths(entries)
    yield from _scores(plan, entries)
    yield from _measured(layers)
    for given in plan.get("maps", ()):
        values = {int(layer): list(row) for layer, row in given["values"].items()}
        labels = tuple(given.get("labels", ()))
        number = format_percent if given.get("share") else format_number
        show: Callable[[Any], str] = labels.__getitem__ if labels else number
        yield _made(
            given["title"],
            given.get("note", ""),
            given.get("provenance", "decided"),
            values,
            show,
            labels=labels,
            drawn=given.get("drawn", True),
        )


def _outcome(entries: Sequence[Plan]) -> Iterator[ExpertMap]:
    values: Values = {}
    for entry in entries:
        row = [OUTCOMES.index("dropped")] * entry["num_experts"]
        shared = OUTCOMES.index("kept as a difference" if entry.get("ranks") else "merged")
        for group in _made_of(entry):
            for expert in group:
                row[expert] = OUTCOMES.index("kept") if len(group) == 1 else shared
        for expert in entry.get("dominants", ()):
            row[expert] = OUTCOMES.index("kept") if entry.get("ranks") else row[expert]
        for expert in entry.get("protected", ()):
            row[expert] = OUTCOMES.index("kept, a super expert")
        values[entry["layer"]] = row
    if any(value for row in values.values() for value in row):
        yield _made("Outcome", "What became of each expert.", "decided", values, OUTCOMES.__getitem__, labels=OUTCOMES)


def _widths(entries: Sequence[Plan]) -> Iterator[ExpertMap]:
    tables = {entry["layer"]: entry for entry in entries if entry.get("options")}
    parts = list(dict.fromkeys(part for entry in tables.values() for part in entry["options"]))
    if all(len({tuple(names) for names in entry["options"].values()}) == 1 for entry in tables.values()):
        parts = parts[:1]  # the matrices of an expert all have the same width
    used = {name for entry in tables.values() for names in entry["options"].values() for name in names}
    labels = tuple(sorted(used, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)))
    for part in parts:
        values: Values = {}
        for layer, entry in tables.items():
            values[layer] = [None] * entry["num_experts"]
            for expert, name in zip(entry["keep"], entry["options"].get(part, ()), strict=False):
                values[layer][expert] = labels.index(name)
        title = "Bits per weight" if len(parts) == 1 else f"Bits per weight, {part}"
        note = "Width of the stored weights, scales not counted."
        yield _made(title, note, "decided", values, lambda value: width_text(labels[value]), labels=labels)


def width_text(name: str) -> str:
    """`2 bits`; what is no number as it is."""
    if name == KEEP:
        return "not quantized"
    return f"{name} bit{'' if name == '1' else 's'}" if name.isdigit() else name


def _scores(plan: Plan, entries: Sequence[Plan]) -> Iterator[ExpertMap]:
    values = {entry["layer"]: list(entry["scores"]) for entry in entries if entry.get("scores")}
    if not values:
        return
    config = plan.get("config") or {}
    criterion = config.get("criterion")
    name = criterion if isinstance(criterion, str) else "criterion of its own"
    by_layer = config.get("scope") != "global"
    note = "The lowest go first"
    note += ", layer by layer; colours are shares of a layer's largest." if by_layer else ", whatever their layer."
    texts = {}
    for layer, row in values.items():
        order = sorted(range(len(row)), key=lambda expert, row=row: -row[expert])  # type: ignore[misc]
        rank = {expert: place for place, expert in enumerate(order, start=1)}
        texts[layer] = [f"{format_number(value)} (rank {rank[e]} of {len(row)})" for e, value in enumerate(row)]
    kind = "measured" if name == ABLATION else "derived"
    yield ExpertMap(f"Score ({name})", note, kind, values, texts, by_layer=by_layer)


def _measured(layers: Sequence[Any]) -> Iterator[ExpertMap]:
    """Traffic, mean gate value and output size, and the error of the fewest bits that were tried."""
    found = {entry["layer"]: entry["statistics"] for entry in layers}
    if not found:
        return
    tokens = {layer: statistics["tokens"] for layer, statistics in found.items()}
    shares: Values = {layer: [count / (sum(row) or 1) for count in row] for layer, row in tokens.items()}
    traffic = _made("Traffic", "Share of its layer's routed calibration tokens.", "measured", shares, format_percent)
    texts = {
        layer: [f"{count:,} tokens, {text}" for count, text in zip(row, traffic.texts[layer], strict=True)]
        for layer, row in tokens.items()
    }
    yield replace(traffic, texts=texts)
    for title, name in (("Mean gate value", "gate_sum"), ("Mean output norm", "norm_sum")):
        means: Values = {
            layer: [total / count if count else None for total, count in zip(row[name], tokens[layer], strict=True)]
            for layer, row in found.items()
            if name in row
        }
        yield _made(title, "Over the tokens routed to the expert.", "measured", means, format_number, drawn=False)
    widths = {name for row in found.values() for name in row if name.startswith(ERROR)}
    numbers = sorted(int(name.removeprefix(ERROR)) for name in widths if name.removeprefix(ERROR).isdigit())
    if numbers:
        name, passed = f"{ERROR}{numbers[0]}", {entry["layer"]: entry["num_tokens"] for entry in layers}
        errors: Values = {
            layer: [None if error is None else error / (passed[layer] or 1) for error in row[name]]
            for layer, row in found.items()
        }
        few = width_text(str(numbers[0]))
        note = (
            f"Squared error when this expert alone has {few}, over the squared hidden states that leave the layer, "
            "mean over all tokens."
        )
        yield _made(f"Error at {few}", note, "measured", errors, lambda value: f"{value:.3g}")


def _made(
    title: str,
    note: str,
    provenance: str,
    values: Values,
    show: Callable[[Any], str],
    *,
    labels: tuple[str, ...] = (),
    drawn: bool = True,
) -> ExpertMap:
    texts = {layer: ["" if value is None else show(value) for value in row] for layer, row in values.items()}
    return ExpertMap(title, note, provenance, values, texts, labels, drawn=drawn)
