"""Reports: what is computed, what is left out, what is said in words, and that no figure is invented."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_compress.report import tables
from moe_compress.report.build import build_report, decode_ratios, headline_metric, recovery
from moe_compress.report.markdown import headline, limits, random_lines, report_markdown
from moe_compress.report.paths import without_local_paths
from moe_compress.report.single import tiles
from moe_compress.report.tables import MISSING, summary_rows
from moe_compress.text import UNDEFINED

RECIPE = "model: org/model\nsteps:\n- op: prune\n  criterion: reap\n  keep: 0.75\n"
CHECKS = {
    name: {"passed": True, "detail": f"all {name} well"} for name in ("coverage", "bytes", "keys", "logits", "target")
}


def metric(value: float, stderr: float | None = None, higher: bool | None = True) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "higher_is_better": higher}


def model(scale: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "total_params": int(6_919_161_856 * scale),
        "active_params": 1_281_884_160,
        "stored_bytes": int(13_838_721_024 * scale),
        "active_bytes_per_token": 2_361_393_152,
        "flops_per_token": 2.461e9,
        "expert_flops_per_token": 1.611e9,
        "experts_per_token_mean": 8,
        "tasks": {
            "arc_easy": {"acc": metric(0.76 * scale, 0.0088), "acc_norm": metric(0.71 * scale, 0.0093)},
            "code": {"bits_per_byte": metric(1.531 / scale, 0.021, higher=False)},
        },
        "speed": {"prefill_tokens_per_s": 3154.7 / scale, "decode_tokens_per_s": 21.9},
        "peak_rss_bytes": int(15_300_000_000 * scale),
    } | more


def draw(seed: int, bits: float, acc: float) -> dict[str, Any]:
    tasks = {"arc_easy": {"acc": metric(acc)}, "code": {"bits_per_byte": metric(bits, higher=False)}}
    return {"seed": seed, "tasks": tasks}


SETTINGS = {
    "model": "org/model",
    "criterion": "reap",
    "steps": [{"op": "prune", "criterion": "reap"}],
    "calibration": {"calibration_tokens": 262144, "fewest_tokens_per_expert": 311, "starved": [[3, 17]]},
    "eval": {"limit": 200, "num_fewshot": 0},
    "versions": {"torch": "2.13.0"},
    "hardware": {"cpu": "some cpu"},
}


@pytest.fixture
def report() -> dict[str, Any]:
    draws = [draw(0, 1.9, 0.61), draw(1, 2.1, 0.70), draw(2, 2.3, 0.52)]
    return build_report(model(), model(0.75), draws, CHECKS, SETTINGS)


# build


def test_ratio_is_compressed_over_baseline(report: dict[str, Any]) -> None:
    assert report["ratio"]["stored_bytes"] == pytest.approx(0.75)
    assert report["ratio"]["active_params"] == 1
    assert report["ratio"]["speed"]["prefill_tokens_per_s"] == pytest.approx(1 / 0.75)
    assert "tasks" not in report["ratio"]


def test_recovery_inverts_where_lower_is_better(report: dict[str, Any]) -> None:
    assert report["recovery"] == {"arc_easy": pytest.approx(0.75), "code": pytest.approx(0.75)}
    assert report["recovery_metric"] == {"arc_easy": "acc", "code": "bits_per_byte"}
    assert report["recovery_by_metric"]["arc_easy"]["acc_norm"]["value"] == pytest.approx(0.75)
    assert recovery(metric(2.0, higher=False), metric(1.0, higher=False))["value"] == 2.0


def test_stderr_of_recovery_matches_simulation() -> None:
    """First-order propagation against the standard deviation of 200,000 simulated quotients."""
    rng = np.random.default_rng(0)
    above, below = rng.normal(0.6, 0.01, 200_000), rng.normal(0.8, 0.012, 200_000)
    left = recovery(metric(0.8, 0.012), metric(0.6, 0.01))
    assert left["stderr"] == pytest.approx((above / below).std(), rel=0.02)
    inverted = recovery(metric(0.6, 0.01, higher=False), metric(0.8, 0.012, higher=False))
    assert inverted["stderr"] == pytest.approx((above / below).std(), rel=0.02)


def test_zero_baselines_are_undefined_not_infinite() -> None:
    zero = model(total_params=0, tasks={"qa": {"exact_match": metric(0.0, 0.0)}})
    report = build_report(zero, model(tasks={"qa": {"exact_match": metric(0.5, 0.1)}}))
    assert report["ratio"]["total_params"] is None
    assert report["recovery"] == {"qa": None}
    assert {row.recovery for row in summary_rows(report) if row.label.startswith("qa")} == {UNDEFINED}
    assert "not compared" in headline(report)


def test_a_compressed_model_that_lost_everything_recovers_zero() -> None:
    assert recovery(metric(0.8, 0.01), metric(0.0, 0.0)) == {"value": 0.0, "stderr": 0.0}


def test_unknown_direction_gives_no_recovery_and_no_verdict() -> None:
    tasks = {"odd": {"score": metric(1.0, higher=None)}}
    report = build_report(model(tasks=tasks), model(tasks=tasks), [{"tasks": tasks}])
    assert report["recovery"] == {"odd": None}
    assert report["random_summary"]["odd"]["score"]["beats_mean"] is None
    assert "cannot be judged" in "\n".join(random_lines(report))


def test_missing_parts_are_left_out() -> None:
    bare = {"total_params": 10}
    report = build_report(bare, bare)
    assert report["ratio"] == {"total_params": 1.0}
    assert report["recovery"] == report["random_summary"] == {}
    assert report["provenance"] == {"total_params": "derived", "ratio": "derived"}
    rows = {row.label: row for row in summary_rows(report)}
    assert rows["stored size"].baseline == rows["decode speed"].compressed == MISSING
    assert "FLOPs per token" not in rows
    text = report_markdown(report, RECIPE)
    assert "## Against chance\n\nThese steps have no random counterpart" in text
    assert "No task was evaluated" in text
    assert "Speed was not compared" in text
    assert text.count("not run") == 5


def test_a_metric_on_one_side_only_has_no_recovery() -> None:
    report = build_report(model(tasks={}), model())
    assert report["recovery"] == {}
    row = next(row for row in summary_rows(report) if row.label == "code · bits_per_byte ↓")
    assert (row.baseline, row.compressed, row.recovery) == (MISSING, "1.5310 ± 0.0210", "-")
    report = build_report(model(), model(tasks={}))
    row = next(row for row in summary_rows(report) if row.label == "code · bits_per_byte ↓")
    assert (row.baseline, row.compressed) == ("1.5310 ± 0.0210", MISSING)


def test_the_report_is_strict_json(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    tasks = {"qa": {"acc": metric(math.nan, math.nan), "f1": metric(0.5, math.inf)}}
    broken = build_report(model(tasks=tasks), model(tasks=tasks), [{"tasks": tasks}])
    json.dumps(broken, allow_nan=False)
    assert broken["recovery_by_metric"]["qa"]["f1"] == {"value": 1.0, "stderr": None}
    assert broken["recovery"]["qa"] is None
    assert "qa" in report_markdown(broken, RECIPE)


def test_inputs_are_not_shared_with_the_report() -> None:
    source = model()
    before = copy.deepcopy(source)
    build_report(source, source)["compressed"]["tasks"]["code"]["bits_per_byte"]["value"] = 0
    assert source == before


def test_every_figure_says_where_it_comes_from(report: dict[str, Any]) -> None:
    kinds = report["provenance"]
    assert kinds["tasks"] == kinds["speed"] == kinds["peak_rss_bytes"] == kinds["stored_bytes"] == "measured"
    assert kinds["flops_per_token"] == kinds["ratio"] == kinds["recovery"] == "derived"
    assert set(model()) <= set(kinds)
    row = next(row for row in summary_rows(report) if row.label == "stored size")
    assert row.provenance == "measured"


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (["acc_norm", "acc"], "acc"),
        (["exact_match,strict-match", "exact_match,flexible-extract"], "exact_match,strict-match"),
        (["word_perplexity", "byte_perplexity", "bits_per_byte"], "bits_per_byte"),
        (["mcc"], "mcc"),
    ],
)
def test_headline_metric(metrics: list[str], expected: str) -> None:
    assert headline_metric(dict.fromkeys(metrics)) == expected


# random baselines


def test_random_summary_in_both_directions(report: dict[str, Any]) -> None:
    code = report["random_summary"]["code"]["bits_per_byte"]
    assert (code["count"], code["mean"], code["best"]) == (3, pytest.approx(2.1), 1.9)
    assert code["spread"] == pytest.approx(0.2)
    assert code["beats_mean"] is True
    assert code["beats_best"] is False
    accuracy = report["random_summary"]["arc_easy"]["acc"]
    assert accuracy["beats_mean"] is False
    assert accuracy["best"] == 0.70
    assert "acc_norm" not in report["random_summary"]["arc_easy"]
    lines = random_lines(report)
    assert (
        "* code, bits_per_byte: reap beats the mean of 3 random prunings, by no more than the spread over seeds; "
        "the best seed is as good or better." in lines
    )
    assert any(line.startswith("* arc_easy, acc: reap does not beat the mean") for line in lines)
    assert "(0, 1, 2)" in "\n".join(lines)


@pytest.mark.parametrize(
    ("steps", "title"),
    [
        ([{"op": "prune"}], "random pruning"),
        ([{"op": "quantize", "average_bits": 2.5}], "random bit allocation"),
        ([{"op": "quantize", "bits": 4}], "chance"),
        ([{"op": "tie"}], "chance"),
    ],
)
@pytest.mark.parametrize("draws", [[], [draw(0, 1.9, 0.61), draw(1, 2.1, 0.6)]])
def test_it_is_said_what_was_drawn(steps: list[dict[str, Any]], title: str, draws: list[dict[str, Any]]) -> None:
    report = build_report(model(), model(), draws, CHECKS, SETTINGS | {"steps": steps})
    text = report_markdown(report, RECIPE)
    assert f"\n## Against {title}\n" in text and text.count("## Against") == 1
    if title != "chance":
        assert f"beats the mean of 2 {title}s" in text if draws else f"No {title} was evaluated" in text
    elif not draws:
        assert "no random counterpart" in text


def test_one_seed_has_no_spread() -> None:
    report = build_report(model(), model(), [draw(7, 1.9, 0.61)], CHECKS, SETTINGS)
    assert report["random_summary"]["code"]["bits_per_byte"]["spread"] is None
    assert "* code, bits_per_byte: reap beats the mean of 1 random pruning." in random_lines(report)
    assert any("1 random seed " in limit for limit in limits(report))


def test_only_what_was_calibrated_depends_on_the_calibration_text() -> None:
    for calibration in (None, {"tokens": "abc", "starved": []}):
        report = build_report(model(), model(), (), CHECKS, SETTINGS | {"calibration": calibration})
        said = any(limit.startswith("Scores come from the calibration text") for limit in limits(report))
        assert said == bool(calibration)


def test_equal_to_random_does_not_beat_it() -> None:
    tasks = {"qa": {"acc": metric(0.5)}}
    summary = build_report({}, {"tasks": tasks}, [{"tasks": tasks}] * 3)["random_summary"]["qa"]["acc"]
    assert summary["beats_mean"] is False
    assert summary["spread"] == 0


# words


def test_report_markdown_shows_all_parts(report: dict[str, Any]) -> None:
    plan = {"op": "prune", "summary": ["24 of 32 experts kept", "Each of 2 layers keeps 1 to 12 experts."]}
    text = report_markdown(report, RECIPE, [plan])
    assert "stored size 13.8 GB → 10.4 GB (75.0 %)" in text
    assert "* step 0, prune: 24 of 32 experts kept\n  Each of 2 layers keeps 1 to 12 experts.\n" in text
    assert "| code · bits_per_byte ↓ | 1.5310 ± 0.0210 | 2.0413 ± 0.0210 | - | 75.0 ± 1.3 % | measured |" in text
    assert "fewest_tokens_per_expert: 311" in text
    assert "1: layer 3 expert 17" in text
    assert "torch: 2.13.0" in text
    assert "some cpu" in text
    assert "cut to its first 200 documents" in text
    assert "No task lets the model write" in text
    assert RECIPE.rstrip() in text


def test_failed_checks_stand_in_the_headline(report: dict[str, Any]) -> None:
    assert "FAILED" not in headline(report)
    report["checks"]["bytes"] = {"passed": False, "detail": "lost a | tensor"}
    assert "Verification FAILED: bytes" in headline(report)
    text = report_markdown(report, RECIPE)
    assert "| bytes | **FAILED** | lost a \\| tensor |" in text


def test_tables_are_rectangular(report: dict[str, Any]) -> None:
    report["checks"]["keys"]["detail"] = "two\nlines | and a bar"
    blocks = re.findall(r"(?:^\|.*\n)+", report_markdown(report, RECIPE), flags=re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (tables.format_bytes(0), "0 B"),
        (tables.format_bytes(999), "999 B"),
        (tables.format_bytes(999_600), "1 MB"),
        (tables.format_bytes(13_838_721_024), "13.8 GB"),
        (tables.format_count(6_919_161_856), "6.92 B"),
        (tables.format_count(96), "96"),
        (tables.format_flops(2.461e9), "2.46 GFLOP"),
        (tables.format_rate(3154.7), "3,155 tokens/s"),
        (tables.format_percent(0.98234, 0.0051), "98.2 ± 0.5 %"),
        (tables.format_percent(None), UNDEFINED),
        (tables.format_number(0.85312), "0.8531"),
        (tables.format_number(123456.7), "123,457"),
        (tables.format_metric(metric(15.312, 0.0123)), "15.31 ± 0.0123"),
    ],
)
def test_number_formats(text: str, expected: str) -> None:
    assert text == expected


# speed


def test_the_range_of_the_speed_ratio_is_that_of_turns() -> None:
    """Each turn is compared with the other model's of the same turn; medians alone would hide how much they differ."""
    before = {
        "speed": {"decode_tokens_per_s": 10.0},
        "speed_turns": {"decode_tokens_per_s": {"1": 10.0, "2": 8.0, "3": 20.0}},
    }
    after = {
        "speed": {"decode_tokens_per_s": 11.0},
        "speed_turns": {"decode_tokens_per_s": {"1": 11.0, "2": 10.0, "3": 18.0}},
    }
    report = build_report(before, after)
    assert decode_ratios(report) == (0.9, 1.25) and report["provenance"]["speed_turns"] == "measured"
    assert any("at 90.0 % to 125.0 %" in limit for limit in limits(report))
    (tile,) = tiles(report)
    assert (tile["value"], tile["lines"][1]) == ("+10.0 %", "turn by turn −10.0 % to +25.0 %")  # noqa: RUF001
    assert decode_ratios(build_report({"speed": before["speed"]}, after)) is None, "they did not take turns"


# paths


def test_local_paths_are_shortened_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private" / "my chats").mkdir(parents=True)
    home = "/home/someone/secret"
    assert without_local_paths({
        "model": f"{home}/model",
        "datasets": [str(tmp_path / "private" / "my chats"), "./my/x.jsonl", "../up", "~/x/y.txt"],
        "relative": "private/my chats", "said": f"The shard `{home}/model/a.safetensors` is missing ({home}/b).",
    }) == {
        "model": "model", "datasets": ["my chats", "x.jsonl", "up", "y.txt"],
        "relative": "my chats", "said": "The shard `a.safetensors` is missing (b).",
    }  # fmt: skip
    for text in ("allenai/c4", "12.3 tokens/s", "a / b", "reference", "", ".", "~5 GB", "https://huggingface.co/a/b"):
        assert without_local_paths(text) == text
