"""What the page draws: frontier, maps of experts, strips, bars and histograms, against definitions written out here."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.errors import UsageError
from moe_compress.report.experts import ExpertMap, expert_maps, expert_statistics, survivors
from moe_compress.report.frontier import (
    SIZE,
    WORK,
    Point,
    dominating,
    mean_recovery,
    measure_of_size,
    points,
    shared_tasks,
    staircase,
    ticks,
)
from moe_compress.report.heatmap import SHADES, Shade, heat_maps
from moe_compress.report.plots import (
    against_chance,
    axis,
    change,
    histogram,
    in_lanes,
    letter,
    paired_bars,
    plane,
    recovery_strips,
    tight_axis,
)
from moe_compress.report.result import Result
from moe_compress.report.single import lede, title
from tests.results import OTHER_TASKS, experts, made, plan, report_of

# ------------------------------------------------------------------------------------------------------------ frontier


def cloud(seed: int, count: int = 60) -> list[Point]:
    """Points on a coarse grid, so that many share a size, a quality or both."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, 8, size=(count, 2))
    return [Point("result", n, f"p{n}", float(size), float(quality)) for n, (size, quality) in enumerate(pairs)]


@pytest.mark.parametrize("seed", range(5))
def test_dominated_is_no_larger_and_no_worse_and_better_in_one(seed: int) -> None:
    found = cloud(seed)
    for point in found:
        better = [
            other
            for other in found
            if (other.size < point.size and other.quality >= point.quality)
            or (other.size <= point.size and other.quality > point.quality)
        ]
        above = dominating(point, found)
        assert (above is not None) == bool(better)
        assert above is None or (above in better and above.quality == max(other.quality for other in better))


@pytest.mark.parametrize("seed", range(5))
def test_the_staircase_is_the_best_quality_at_each_size(seed: int) -> None:
    found = cloud(seed)
    stairs = staircase(found)
    for size in range(9):
        reachable = [point.quality for point in found if point.size <= size]
        on_stairs = [point.quality for point in stairs if point.size <= size]
        assert bool(reachable) == bool(on_stairs) and max(reachable, default=0) == max(on_stairs, default=0)
    steps = [(point.size, point.quality) for point in stairs]
    assert steps == sorted(set(steps)) and [quality for _, quality in steps] == sorted(quality for _, quality in steps)


def test_equal_points_do_not_dominate_each_other() -> None:
    one, other = Point("result", 0, "a", 1.0, 0.5), Point("result", 1, "b", 1.0, 0.5)
    assert dominating(one, [one, other]) is None


def test_points_of_one_result() -> None:
    report = report_of()
    found = points([report], ["this"])
    assert [point.kind for point in found] == ["result", "baseline", "random", "random", "random"]
    this, original, *randoms = found
    assert (this.size, original.size, original.quality) == (0.75 * 13_838_721_024, 13_838_721_024, 1.0)
    assert this.quality == pytest.approx((0.75 + 0.8) / 2)
    assert this.stderr is None, "one of the tasks has none"
    by_hand = [(acc / 0.76 + 1.531 / bits) / 2 for acc, bits in ((0.5, 1.9), (0.55, 2.1), (0.45, 2.3))]
    assert [point.quality for point in randoms] == pytest.approx(by_hand)
    (relative, *_) = points([report], ["this"], relative=True)
    assert relative.size == pytest.approx(0.75)


def test_work_stands_in_for_a_size_that_is_the_same() -> None:
    def skipping(flops: float, quality: float) -> dict[str, Any]:
        report = made(1.0, quality, quality)
        report["compressed"]["flops_per_token"] *= flops
        report["ratio"]["flops_per_token"] = flops
        return report

    same, less, least = made(1.0, 0.9, 0.9), skipping(0.8, 0.95), skipping(0.6, 0.9)
    assert measure_of_size([same]) == measure_of_size([less, report_of()]) == SIZE
    assert measure_of_size([less]) == measure_of_size([less, least, same]) == WORK
    larger = skipping(0.7, 0.9)
    larger["ratio"]["stored_bytes"] = 1.001
    assert measure_of_size([larger]) == WORK, "routers with rows for zero experts take some bytes more"
    assert title(Result(larger)) == "org/model, 30.0 % fewer FLOPs"
    assert lede(larger)[0].startswith("From 2.46 GFLOP to 1.72 GFLOP per token with prune (reap)")
    larger["settings"]["steps"] = []  # what `eval` writes
    assert lede(larger)[0] == "From 2.46 GFLOP to 1.72 GFLOP per token."
    found = points([less, least, same], ["a", "b", "c"])
    assert [point.size for point in found] == pytest.approx([0.8 * 2.461e9, 0.6 * 2.461e9, 2.461e9, 2.461e9])
    assert [dominating(point, found) is not None for point in found] == [False, False, True, False]
    drawn = plane(found, WORK)
    assert drawn is not None and "FLOP" in drawn.across.ticks[0][1] and "GFLOP" in drawn.marks[-1].text


@pytest.mark.parametrize("size", [13.1e6, 19.4e9, 999e3])
def test_ticks_say_where_they_are(size: float) -> None:
    """Not rounded to another place: 13.25 MB is not 13.2 MB."""
    drawn = plane([Point("result", 0, "a", size, 0.9), Point("baseline", 0, "original", 1.086 * size, 1.0)])
    assert drawn is not None
    for at, text in drawn.across.ticks:
        value, unit = text.split()
        said = float(value) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
        assert drawn.across.at(said) == pytest.approx(at, abs=0.01)


def test_error_of_a_mean_matches_simulation() -> None:
    report = report_of()
    for task, value, error in (("arc_easy", 0.75, 0.012), ("code", 0.8, 0.03)):
        name = report["recovery_metric"][task]
        report["recovery_by_metric"][task][name] = {"value": value, "stderr": error}
    mean, stderr = mean_recovery(report, ["arc_easy", "code"])
    rng = np.random.default_rng(0)
    drawn = (rng.normal(0.75, 0.012, 200_000) + rng.normal(0.8, 0.03, 200_000)) / 2
    assert mean == pytest.approx(drawn.mean(), abs=1e-3) and stderr == pytest.approx(drawn.std(), rel=0.02)


def test_only_tasks_with_the_same_metric_are_shared() -> None:
    one, other = report_of(), report_of()
    assert shared_tasks([one, other]) == ["arc_easy", "code"]
    other["recovery_metric"]["arc_easy"] = "acc_norm"
    assert shared_tasks([one, other]) == ["code"]
    other["recovery"]["code"] = None
    assert shared_tasks([one, other]) == []
    assert points([one, other], ["a", "b"]) == []
    assert points([one, made(0.5, 0.5, 0.5, tasks=OTHER_TASKS)], ["a", "b"]) == []


def test_a_plane_puts_points_where_they_belong() -> None:
    found = points([report_of(), made(0.5, 0.74, 0.7), made(0.75, 0.7, 0.6)], ["a", "b", "c"])
    drawn = plane(found)
    assert drawn is not None and plane([]) is None
    results = {mark.letter: mark for mark in drawn.marks if mark.kind == "result"}
    assert {name: mark.dominated for name, mark in results.items()} == {"A": False, "B": False, "C": True}
    assert "dominated by a" in results["C"].text and "dominated" not in results["A"].text
    assert results["B"].x < results["A"].x == results["C"].x
    assert results["A"].y < results["B"].y < results["C"].y, "y counts from above"
    assert all(0 <= place <= 100 for mark in drawn.marks for place in (mark.x, mark.y))
    assert [mark.kind for mark in drawn.marks].index("result") > [mark.kind for mark in drawn.marks].index("random")
    ends = [(step[0], step[1]) for step in drawn.steps] + [drawn.steps[-1][2:]]
    assert ends[0] == (results["B"].x, results["B"].y), "the frontier begins at the smallest"
    assert all(x1 == x2 or y1 == y2 for x1, y1, x2, y2 in drawn.steps)


# ---------------------------------------------------------------------------------------------------------------- axes


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.33, 1.005), (19.4e9, 24.2e9), (-3.0, 7.0), (5.0, 5.0), (0.0, 0.0)]
)
def test_ticks_are_round_even_and_around(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and len(marks) <= 8
    for step in np.diff(marks):
        power = 10.0 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(step / power - unit) for unit in (1, 2, 2.5, 5, 10)) < 1e-6
    whole = axis([low, high], str)
    assert whole.at(whole.low) == 0 and whole.at(whole.high) == 100
    close = tight_axis([low, high], str)
    assert close.low < low and close.high > high
    assert all(0 <= at <= 100 and close.low <= float(text) <= close.high for at, text in close.ticks)


def test_letters_go_on() -> None:
    assert [letter(number) for number in (0, 25, 26, 53)] == ["A", "Z", "A2", "B3"]


# -------------------------------------------------------------------------------------------------------------- strips


def test_strips_show_a_task_beside_chance() -> None:
    found = recovery_strips([report_of()], ["this"])
    assert found is not None
    scale, strips, whole = found
    assert [strip.label for strip in strips] == ["arc_easy · acc ↑", "code · bits_per_byte ↓"]
    assert whole == scale.at(1.0)
    first = strips[0].dots
    assert [dot.kind for dot in first] == ["random"] * 3 + ["result"]
    assert [dot.at for dot in first[:3]] == [scale.at(value / 0.76) for value in (0.5, 0.55, 0.45)]
    assert first[3].at == scale.at(0.75) and first[3].text == "this: 75.0 ± 1.2 %"
    assert first[3].low < first[3].at < first[3].high and first[0].low == first[0].high == first[0].at
    assert recovery_strips([report_of(bare=True)], ["this"]) is None


def test_dots_in_a_lane_do_not_touch() -> None:
    _, strips, _ = recovery_strips([made(0.75, 0.9 + 0.01 * n, 0.9, draws=True) for n in range(5)], list("abcde")) or (
        0,
        (),
        0,
    )
    assert strips[1].lanes == 6, "five equal results below each other, chance above them"
    for strip in strips:
        for lane in range(1, strip.lanes):
            places = sorted(dot.at for dot in strip.dots if dot.lane == lane)
            assert all(after - before >= 5.5 for before, after in pairwise(places))
        assert {dot.lane for dot in strip.dots if dot.kind == "random"} == {0}
    assert in_lanes([]) == []


@pytest.mark.parametrize(
    ("mean", "best", "said"),
    [(True, True, "better than all 3 seeds"), (True, False, "better than the mean of 3 seeds, not than the best"),
     (False, False, "no better than 3 seeds"), (None, None, "")],
)  # fmt: skip
def test_chance_in_words(mean: bool | None, best: bool | None, said: str) -> None:
    report = report_of()
    report["random_summary"]["code"]["bits_per_byte"] |= {"beats_mean": mean, "beats_best": best}
    assert against_chance(report, "code", "bits_per_byte") == said
    assert against_chance(report, "code", "other") == ""


# ----------------------------------------------------------------------------------------------------- bars, histogram


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (100, 80.4, "-19.6 %"),
        (100, 104.9, "+4.9 %"),
        (10_000, 10_001, "unchanged"),
        (0, 5, ""),
        (None, 5, ""),
        (5, None, ""),
    ],
)
def test_changes(before: float | None, after: float | None, said: str) -> None:
    assert change(before, after) == said.replace("-", "\u2212")


def test_bars_are_as_long_as_their_numbers() -> None:
    bars = paired_bars({"a": 10.0, "b": 40.0, "none": 0}, {"a": 5.0, "new": 20.0}, "{:g}".format)
    assert [(bar.label, bar.before, bar.after, bar.lengths) for bar in bars] == [
        ("b", "40", "0", (100.0, 0.0)), ("a", "10", "5", (25.0, 12.5)), ("new", "0", "20", (0.0, 50.0)),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_histogram_counts_every_expert_once(seed: int) -> None:
    tokens = np.random.default_rng(seed).lognormal(7, 1, 300).astype(int).tolist()
    found = histogram(tokens, 5)
    assert found is not None
    edges = ticks(min(tokens), max(tokens), 16)
    counts, _ = np.histogram(tokens, edges)
    drawn = {round(x, 6): int(text.split()[0]) for x, _, _, text in found.bars}
    assert drawn == {round(found.across.at(edge), 6): int(n) for edge, n in zip(edges[:-1], counts, strict=True) if n}
    assert sum(drawn.values()) == 300 and found.most == counts.max()
    assert [round(height, 6) for _, _, height, _ in found.bars] == [
        round(100 * n / counts.max(), 6) for n in counts if n
    ]


def test_histogram_of_equal_counts_and_of_none() -> None:
    found = histogram([7, 7, 7], 7)
    assert found is not None and found.most == 3 and len(found.bars) == 1
    assert histogram([], 1) is None
    marked = histogram([0, 10, 20, 40], 10)
    assert marked is not None and marked.minimum == marked.across.at(10)


# -------------------------------------------------------------------------------------------------------- experts.json


def scores(seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    layers = []
    for layer in (0, 2):
        statistics = {
            name: rng.random(5) * 1e4
            for name in ("gate_sum", "norm_sum", "max_abs", "easy_ep", "error.expert.2", "relative_error.expert.2")
        }
        statistics |= {"tokens": np.array([0.0, 3, 7, 1e6, 12]), "error.gate_proj.2": rng.random(5)}
        statistics |= {"output_sum": rng.random((5, 64)), "coselection": rng.random((5, 5))}
        layers.append(LayerScores(layer, 5, 2, 100, 0.9, statistics))
    return Scores(layers, {"source": "x"})


def test_experts_json_keeps_what_has_one_number_per_expert(tmp_path: Path) -> None:
    measured = scores()
    measured.layers[1].statistics["max_abs"][2] = np.inf
    measured.save(tmp_path / "scores")
    found = json.loads(json.dumps(expert_statistics([tmp_path / "scores", tmp_path / "none"]), allow_nan=False))
    assert found["format"] == 1 and found["steps"][1] is None
    for layer, kept in zip(measured.layers, found["steps"][0]["layers"], strict=True):
        assert (kept["layer"], kept["num_experts"], kept["num_tokens"]) == (layer.layer, 5, 100)
        assert set(kept["statistics"]) == {"tokens", "gate_sum", "norm_sum", "max_abs", "relative_error.expert.2"}
        for name, values in kept["statistics"].items():
            for value, exact in zip(values, layer.statistics[name], strict=True):
                assert (value is None and np.isinf(exact)) or value == pytest.approx(exact, rel=1e-6)
        assert kept["statistics"]["tokens"] == [0, 3, 7, 1000000, 12]
    assert len(json.dumps(found)) < 3000


def test_scores_can_be_read_in_part(tmp_path: Path) -> None:
    scores().save(tmp_path)
    part, whole = Scores.load(tmp_path, only=lambda name: name == "tokens"), Scores.load(tmp_path)
    assert [set(layer.statistics) for layer in part.layers] == [{"tokens"}] * 2
    assert whole.layers[0].statistics.keys() == scores().layers[0].statistics.keys()
    with pytest.raises(UsageError, match="holds no scores"):
        Scores.load(tmp_path / "none")


# ---------------------------------------------------------------------------------------------------------------- maps


def titled(maps: list[ExpertMap]) -> dict[str, ExpertMap]:
    return {one.title: one for one in maps}


def test_maps_of_two_steps_are_over_the_source(tmp_path: Path) -> None:
    found = titled(expert_maps(plan()["steps"], experts()["steps"]))
    assert list(found) == [
        "Step 1: outcome", "Step 1: score (reap)", "Step 1: traffic", "Step 1: mean gate value",
        "Step 1: error at 2 bits", "Step 2: bits per weight",
    ]  # fmt: skip
    assert found["Step 1: outcome"].values == {1: [1, 3, 0, 0], 3: [0, 0, 0, 3]}
    assert found["Step 1: traffic"].values[3] == [0.4, 0.2, 0.3, 0.1]
    assert found["Step 1: mean gate value"].values[1] == [0.5] * 4 and not found["Step 1: mean gate value"].drawn
    assert found["Step 1: error at 2 bits"].values[1] == [0.05, 0.01, 0.02, 0.005]
    bits = found["Step 2: bits per weight"]
    assert [[bits.labels[value] if value is not None else None for value in row] for row in bits.values.values()] == [
        ["4", None, "2", "4"], ["2", "2", "4", None],
    ]  # fmt: skip
    assert survivors(plan()["steps"]) == {1: {0, 2, 3}, 3: {0, 1, 2}}
    kinds = {title: one.provenance for title, one in found.items()}
    assert kinds["Step 1: traffic"] == "measured" and kinds["Step 1: score (reap)"] == "derived"


@pytest.mark.parametrize("seed", range(5))
def test_indices_lead_back_through_any_steps(seed: int) -> None:
    """Random prunings and merges in a row, each with a map of its own; the same by carrying sets of sources along."""
    rng = np.random.default_rng(seed)
    sources = [{expert} for expert in range(12)]
    steps, expected = [], []
    for number in range(4):
        count = len(sources)
        values = rng.random(count).tolist()
        steps.append(
            {"layers": [{"layer": 9, "num_experts": count}], "maps": [{"title": f"m{number}", "values": {"9": values}}]}
        )
        row: list[float | None] = [None] * 12
        for value, group in zip(values, sources, strict=True):
            for source in group:
                row[source] = value
        expected.append(row)
        order = rng.permutation(count).tolist()
        entry: dict[str, Any] = steps[-1]["layers"][0]
        if number % 2:  # merge the first two that the permutation names, in the place of the smaller
            first, second = sorted(order[:2])
            entry["groups"] = [[e] if e != first else [first, second] for e in range(count) if e != second]
        else:
            entry["keep"] = sorted(order[: count - 2])
        sources = [
            set().union(*(sources[e] for e in group)) for group in entry.get("groups") or [[e] for e in entry["keep"]]
        ]
    found = titled(expert_maps(steps, []))
    for number, row in enumerate(expected):
        assert found[f"Step {number + 1}: m{number}"].values == {9: row}
    assert survivors(steps) == {9: set().union(*sources)}


def test_words_of_a_step_of_another_kind() -> None:
    """The seam for operations to come: maps in the plan, drawn as they are."""
    given = {
        "title": "Tied to",
        "note": "Whom it follows.",
        "values": {"0": [0, 1, None]},
        "labels": ["itself", "layer 2"],
    }
    share = {"title": "Skip ratio", "provenance": "measured", "values": {"0": [0.0, 0.25, 0.5]}, "share": True}
    place = {"title": "Place", "values": {"0": [2, 1, 0]}, "drawn": False}
    steps = [{"layers": [{"layer": 0, "num_experts": 3}], "maps": [given, share, place]}]
    words, amounts, places = expert_maps(steps, [None])
    assert (words.texts, words.labels, words.provenance) == (
        {0: ["itself", "layer 2", ""]},
        ("itself", "layer 2"),
        "decided",
    )
    assert (amounts.texts[0], amounts.provenance, amounts.note) == (["0.0 %", "25.0 %", "50.0 %"], "measured", "")
    assert places.texts == {0: ["2", "1", "0"]}
    drawn = heat_maps([words, amounts, places], survivors(steps))
    assert drawn is not None and [one.scale for one in drawn.maps] == ["words", "amounts"]
    assert [(shade.label, shade.count) for shade in drawn.maps[0].shades] == [("itself", 1), ("layer 2", 1)]
    assert (drawn.maps[1].low, drawn.maps[1].high) == ("0.0 %", "50.0 %")
    assert [fact["title"] for fact in drawn.facts] == ["Tied to", "Skip ratio", "Place"]
    assert drawn.marks == "", "nobody is gone"


def test_members_of_a_group_that_keep_differences_are_not_merged() -> None:
    entry = {"layer": 0, "num_experts": 4, "groups": [[0, 2, 3], [1]], "dominants": [2, 1], "ranks": {"up_proj": 4}}
    (outcome,) = expert_maps([{"layers": [entry]}], [])
    assert outcome.texts[0] == ["kept as a difference", "kept", "kept", "kept as a difference"]
    (outcome,) = expert_maps([{"layers": [entry | {"ranks": {}}]}], [])
    assert outcome.texts[0] == ["merged", "kept", "merged", "merged"]


def test_projections_of_other_widths_have_maps_of_their_own() -> None:
    options = {"gate_proj": ["2", "keep"], "down_proj": ["3", "keep"]}
    steps = [{"layers": [{"layer": 0, "num_experts": 2, "keep": [0, 1], "options": options}]}]
    found = titled(expert_maps(steps, []))
    assert list(found) == ["Bits per weight, gate_proj", "Bits per weight, down_proj"]
    assert found["Bits per weight, down_proj"].texts == {0: ["3 bits", "not quantized"]}
    assert found["Bits per weight, gate_proj"].labels == ("2", "3", "keep"), "from few bits to all"


def test_nothing_known_gives_no_map() -> None:
    assert expert_maps([], []) == [] and heat_maps([], {}) is None
    assert expert_maps([{"config": {}}], [None]) == []


def squares(path: str) -> dict[tuple[int, int], float]:
    """The cells that a path paints, with the share of each that it covers."""
    found: dict[tuple[int, int], float] = {}
    pieces = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-([\d.]+)z", path)
    assert "".join("M{} {}h{}v{}h-{}z".format(*piece) for piece in pieces) == path
    for x, y, width, height, back in pieces:
        assert width == back
        for column in range(math.floor(float(x)), math.ceil(float(x) + float(width) - 1e-9)):
            place = (math.floor(float(y)), column)
            assert place not in found
            found[place] = min(float(width), 1.0) * float(height)
    return found


@pytest.mark.parametrize("columns", [16, 100])
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("by_layer", [False, True])
def test_every_cell_is_painted_once_and_more_is_darker(columns: int, skewed: bool, by_layer: bool) -> None:
    rng = np.random.default_rng(columns)
    layers = [2, 3, 5]
    table = rng.lognormal(0, 3, (3, columns)) if skewed else rng.random((3, columns))
    values: dict[int, list[Any]] = {layer: row.tolist() for layer, row in zip(layers, table, strict=True)}
    values[3][4], table[1, 4] = None, np.nan
    texts = {layer: ["" if v is None else f"{v:.3g}" for v in row] for layer, row in values.items()}
    gone = {2: set(range(columns)) - {0, 7}, 3: set(range(columns)), 5: set(range(1, columns))}
    drawn = heat_maps([ExpertMap("Amount", "", "measured", values, texts, by_layer=by_layer)], gone)
    assert drawn is not None and (drawn.layers, drawn.columns) == ((2, 3, 5), columns)
    (one,) = drawn.maps
    shade_of: dict[tuple[int, int], int] = {}
    for number, shade in enumerate(one.shades):
        painted = squares(shade.path)
        assert len(painted) == shade.count and not painted.keys() & shade_of.keys()
        assert all(share > (0.7 if columns == 16 else 0.999) for share in painted.values())
        shade_of |= dict.fromkeys(painted, number)
    assert shade_of.keys() == {(row, e) for row in range(3) for e in range(columns)} - {(1, 4)}
    scaled = table / np.nanmax(table, axis=1, keepdims=True) if by_layer else table
    order = sorted(shade_of, key=lambda place: scaled[place])
    shades = [shade_of[place] for place in order]
    assert shades == sorted(shades) and shades[-1] == SHADES - 1 and shades[0] == 0
    assert bool(one.spacing) == skewed
    assert set(squares(drawn.marks)) == {(0, 0), (0, 7), (2, 0)}


def test_widths_go_from_light_to_dark() -> None:
    labels = ("1", "2", "3", "keep")
    one = ExpertMap("Bits", "", "decided", {0: [0, 1, 2, 3]}, {0: ["", "", "", ""]}, labels)
    (drawn,) = (heat_maps([one], {}) or pytest.fail()).maps
    assert [(shade.name, shade.label) for shade in drawn.shades] == [
        ("shade0", "1 bit"), ("shade2", "2 bits"), ("shade4", "3 bits"), ("shade6", "not quantized"),
    ]  # fmt: skip
    methods = ExpertMap("Bits", "", "decided", {0: [0, 1]}, {0: ["", ""]}, ("nf4", "keep"))
    (drawn,) = (heat_maps([methods], {}) or pytest.fail()).maps
    assert [shade.name for shade in drawn.shades] == ["word0", "word1"]
    assert isinstance(drawn.shades[0], Shade)
