"""Figures in the documents are what `benchmarks/results/` holds: tables to the letter, and sentences one by one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from transformers import Qwen3MoeConfig

from benchmarks.cells import RESULTS, TASKS, TEXTS, load, short
from benchmarks.moe_50m import SHAPE
from benchmarks.skip_layers import PARTS
from benchmarks.tables import BOTH_STAGES, MARKS, SEED, TABLES, documents, filled, skip_rivals
from moe_compress.eval.cost import cost

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks" / "README.md"
# Numbers with a point in the text of benchmarks/README.md that are settings, not findings.
SETTINGS = {"0.75", "1.3", "1.6", "2.5", "0.25", "0.5", "2.0", "3.2"}


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_tables_are_what_the_results_say(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert text.count("<!-- table:") == text.count("<!-- end of table -->") == len(MARKS.findall(text))
    assert filled(text) == text, "run `python -m benchmarks.tables`"


def test_every_table_and_every_result_has_its_place() -> None:
    texts = "".join(document.read_text(encoding="utf-8") for document in documents())
    assert {found["name"] for found in MARKS.finditer(texts)} == set(TABLES)
    scripts = re.findall(r"^## `(\w+)`", BENCHMARKS.read_text(encoding="utf-8"), re.MULTILINE)
    results = {file.stem.partition("-")[0] for file in RESULTS.glob("*.json")}
    assert results == set(scripts), "give the results a section in benchmarks/README.md and a table in tables.py"


def prune_claims() -> Iterator[str]:
    found = load("prune_reference")
    random, draws = found["random"], [row["tasks"] for row in found["rows"] if row["criterion"] == "random"]
    rows = {(row["calibration"], row["criterion"]): row["tasks"] for row in found["rows"]}

    def beaten(key: tuple[str, str]) -> list[str]:
        signs = {task: -1 if task in TEXTS else 1 for task in TASKS}
        return [task for task in TASKS if signs[task] * (rows[key][task] - random[task]["mean"]) > 0]

    assert beaten(("mixture", "reap")) == [task for task in TASKS if task != "code"]
    yield "REAP beats the mean of random on all tasks but code"
    alone = beaten(("text 100 %", "reap"))
    assert "facts" not in alone and "reverse" not in alone
    yield "facts and reversing fall below random"
    margin = random["code"]["mean"] - rows["text 80 %", "reap"]["code"]
    better = [one for one in draws if one["code"] < rows["text 80 %", "reap"]["code"]]
    assert len(beaten(("text 80 %", "reap"))) == 8 and (len(better), len(draws)) == (2, 5)
    yield f"The margin on code is small: {margin:.3f} bits, {margin / random['code']['sd']:.1f} standard deviations of"
    yield "two of the five random prunings do better there"
    assert not any("code" in beaten((name, "man")) for name, criterion in rows if criterion == "man")
    assert "code" in beaten(("mixture", "frequency")) and len(beaten(("mixture", "frequency"))) <= 3
    yield "MAN never beats random on code, and `frequency` does so at the price of the skills"


def quantize_claims() -> Iterator[str]:
    rows = load("quantize_reference")["rows"]
    mean = {name: row["mean_bits_per_byte"] for name, row in rows.items()}
    tasks = {name: short(row["tasks"]) for name, row in rows.items()}
    at = [name for name, row in rows.items() if row.get("average_bits") == 2.5]
    sizes = [rows[name]["stored_bytes"] / 1e6 for name in at]
    yield f"{min(sizes):.2f} to {max(sizes):.2f} MB stored (original {rows['original']['stored_bytes'] / 1e6:.2f} MB)"
    others = [name for name in at if name.startswith(("uniform", "random"))]
    programs = [name for name in at if name not in others]
    rules, draws = ([mean[name] for name in others if name.startswith(kind)] for kind in ("uniform", "random"))
    measured = [mean[name] for name in programs if not name.startswith("lp pmq")]
    assert len(measured) == 7 and max(measured) < min(rules + draws)
    yield "Every program by `output_error` or `fisher` is below every rule and every draw"
    assert max(rules) < mean["lp pmq"] < mean["lp pmq_as_released"] < min(draws) < mean["lp pmq_as_released"] + 0.002
    yield f"PMQ's product is below the draws alone (as released, by {min(draws) - mean['lp pmq_as_released']:.3f})"
    steady = ("recall", "sort", "reverse", "brackets")
    shaken = [name for name in at if min(tasks[name][task] for task in steady) < 0.99]
    assert len(shaken) == 1 and all(name.startswith("random") for name in shaken)
    yield "stay at 0.99 to 1.00 in all rows but one draw"
    four, errors = tasks["4 bits"], short(rows["4 bits"]["stderr"])
    assert all(abs(four[t] - tasks["original"][t]) <= 2 * errors[t] for t in TASKS if errors[t])
    assert all(four[t] <= tasks["original"][t] for t in TEXTS) and four["recall"] == tasks["original"]["recall"]
    yield "every task within two standard errors of the original"
    joint, sequence = (tasks[name]["sums"] for name in ("joint drop and bits", "pruned to 75 %, then 3 bits"))
    sizes = [rows[name]["stored_bytes"] for name in ("joint drop and bits", "pruned to 75 %, then 3 bits")]
    assert sizes[0] <= sizes[1]
    yield f"it drops {rows['joint drop and bits']['dropped_experts']} of 128 experts"
    yield f"keeps sums at {joint:.3f} against {sequence:.3f}"
    assert all(mean[f"frontier lp {bits}.0"] < mean[f"frontier gptq {bits}"] for bits in (2, 3, 4))
    yield "nowhere above uniform GPTQ, nor above uniform rounding"
    gains = [mean[f"frontier lp {bits}"] - mean[f"frontier lp-from-2 {bits}"] for bits in (2.2, 2.4, 2.6)]
    assert all(0.0001 < gain < 0.0025 for gain in gains)
    yield "below that curve by up to 0.002 from 2.2 to 2.6"
    assert all(0 < mean[f"frontier lp-from-2 {bits}.0"] - mean[f"frontier gptq {bits}"] < 0.001 for bits in (3, 4))
    yield "up to 0.001 above uniform GPTQ at 3.0 and 4.0"
    chosen = {name: float(name.split()[-1]) for name in rows if name.startswith("frontier lp")}
    assert all(abs(mean[name] - mean["original"]) < 0.001 for name, bits in chosen.items() if bits >= 3.2)
    yield "within 0.001 of"
    for bits in (2, 3, 4):
        same = [name for name, value in chosen.items() if value == bits] + [f"frontier gptq {bits}"]
        assert all(mean[f"frontier rtn {bits}"] > mean[name] for name in same)


def other_claims() -> Iterator[str]:
    found = load("streaming")
    target = found["targets"]["identity_over_cp"]
    yield f"took {found['identity_over_cp']:.2f} times as long as `cp -r` (target: {target:.0f})"
    yield f"its sweep over the layers {found['identity_without_start_and_verification_over_cp']:.2f} times"
    kills = load("kill_resume")["kills"]
    assert all(kill["identical"] for kill in kills) and len(kills) == 20
    assert any(kill["stage"] == "apply" for kill in kills)
    yield "20 runs killed with `kill -9`"
    yield "every killed run ended with the same bits"
    yield f"{cost(Qwen3MoeConfig(**SHAPE)).total_params / 1e6:.1f} million parameters"
    models = load("skip_speed")["models"]
    olmoe = next(
        row for row in models["rows"] if row["model"] == PARTS["layers"] and row["settings"]["batch_size"] == 1
    )
    assert all(ratio >= 1.3 for ratio in olmoe["ratio"].values()) and models["threads"] == 2
    assert all(abs(share - 0.5) < 0.01 for share in olmoe["skipped"].values())
    yield "both reach it"
    yield "on two threads"
    trial = load("gptq_speed")
    assert trial["model"]["shape"]["num_hidden_layers"] == 4 and trial["threads"] == 2
    assert [len(trial["runs"][side]) for side in ("ours", "theirs")] == [3, 1]
    for key, kind in (("quantize_seconds", "quantize_ratio"), ("seconds", "command_ratio")):
        ours, theirs = (median(run[key] for run in trial["runs"][side]) for side in ("ours", "theirs"))
        assert round(theirs / ours, 1) == trial["ratios"][kind]
    assert trial["ratios"]["quantize_ratio"] < trial["targets"]["quantize_ratio"]
    assert trial["ratios"]["peak_rss_ratio"] > trial["targets"]["peak_rss_ratio"] == 1
    ratios = trial["ratios"]
    yield f"The step is {ratios['quantize_ratio']} times as fast, the command {ratios['command_ratio']} times"
    yield f"the target was {trial['targets']['quantize_ratio']}"
    yield f"alone take {trial['floor']['seconds']:.1f} s"


def merge_claims() -> Iterator[str]:
    rows = {row["name"]: row for row in load("merge_reference")["rows"]}
    for ending in ("", ", more text"):
        name = f"8: differences from 2{ending}"
        ours, others = rows[name]["tasks"], [
            row for other, row in rows.items()
            if other.startswith(("8: prune", "8: merge")) and other.endswith("more text") == bool(ending)
        ]  # fmt: skip
        assert all(ours[task] < row["tasks"][task] for row in others for task in TEXTS)
        assert rows[name]["expert_bytes"] <= min(row["expert_bytes"] for row in others)
        assert all(ours["sums"] > row["tasks"]["sums"] for row in others)
        yield "below every pruning and every merging to 8 experts in bits per byte"
        reap = rows[f"8: prune reap{ending}"]["tasks"]
        assert ours["facts"] < reap["facts"]
        yield f"{ours['facts']:.3f} (REAP {reap['facts']:.3f})"


def beyond_two_errors(ours: dict[str, float], original: dict[str, float]) -> list[str]:
    """The tasks that lost more than two standard errors of the difference of two shares."""
    found = []
    for task in (task for task in TASKS if task not in TEXTS):
        questions = 400 if task == "facts" else 200
        error = math.sqrt(sum(share * (1 - share) for share in (ours[task], original[task])) / questions)
        found += [task] if original[task] - ours[task] > 2 * error else []
    return found


def tie_claims() -> Iterator[str]:
    rows = {row["name"]: row for row in load("tie_reference")["rows"]}
    original, best = rows["original"], rows["tie-8-distill, more text"]
    packaged, pairs = rows["recipe tie-8-distill"], rows["recipe tie-2-distill"]
    assert all(row["resident_bytes"] <= 1.1 * row["stored_bytes"] for row in rows.values())
    assert best["expert_bytes"] == packaged["expert_bytes"] >= pairs["expert_bytes"]
    assert best["expert_bytes"] <= 0.6 * original["expert_bytes"] and best["tokens"] <= 2e6
    yield f"{1 - best['expert_bytes'] / original['expert_bytes']:.1%} fewer".replace("%", " %")
    yield f"{best['tokens']:,} tokens, {best['training_seconds'] / 60:.0f} minutes"

    def lost(row: dict[str, Any]) -> list[float]:
        return [row["tasks"][text] - original["tasks"][text] for text in TEXTS]

    assert max(lost(best)) <= 0.03
    yield "{:.3f} bits per byte lost on code and {:.3f} on documentation".format(*lost(best))
    yield "it loses {:.3f} and {:.3f}".format(*lost(packaged))
    yield "lose {:.3f} and {:.3f}".format(*lost(pairs))
    assert beyond_two_errors(best["tasks"], original["tasks"]) == []
    assert beyond_two_errors(packaged["tasks"], original["tasks"]) == ["facts"]
    yield f"facts are at {packaged['tasks']['facts']:.3f} instead of {original['tasks']['facts']:.3f}"

    def code_of(name: str) -> str:
        return f"{rows[name]['tasks']['code']:.3f}"

    wide, narrow = "groups of 8: matched, fitted, rank 33", "groups of 2: matched, fitted, rank 6"
    yield f"(code: {code_of(wide)} against {code_of(narrow)})"
    chain = [code_of(f"groups of 2: {name}") for name in ("average", "matched", "matched, fitted")]
    yield "{} as they come, {} matched, {} fitted".format(*chain)
    yield f"({code_of('groups of 2: average, rank 6')} and {code_of(narrow)})"
    plain = rows["groups of 8: average, rank 33"]["tasks"]
    assert all(plain[text] < rows[wide]["tasks"][text] for text in TEXTS)
    yield f"({plain['code']:.3f} and {code_of(wide)})"


def skip_claims() -> Iterator[str]:
    rows = {row["name"]: row for row in load("skip_reference")["rows"] if "tasks" in row}

    def points(name: str) -> float:
        return 100 * sum(rows[name]["tasks"][task] for task in TASKS if task not in TEXTS) / (len(TASKS) - len(TEXTS))

    seeds = [[row["tasks"] for name, row in rows.items() if name.partition(SEED)[0] == way] for way in BOTH_STAGES]
    assert [len(own) for own in seeds] == [3, 3]
    halved, zeda = ({task: sum(tasks[task] for tasks in own) / 3 for task in TASKS} for own in seeds)
    assert all(zeda[text] < halved[text] for text in TEXTS) and zeda["sums"] < halved["sums"] - 0.03
    yield "zero experts predict text a little better and get fewer `sums` right"
    assert all(abs(zeda[task] - halved[task]) < 0.005 for task in TASKS if task not in (*TEXTS, "sums"))
    yield "all else is level"
    packaged, original = (rows[name]["tasks"] for name in ("recipe zeda-50", "original"))
    yield f"It skips {rows['recipe zeda-50']['skipped']:.1%} of".replace("%", " %")
    code, documentation = (packaged[text] - original[text] for text in TEXTS)
    yield f"code is predicted {-code:.3f} bits per byte better than by the original"
    yield f"documentation {documentation:.3f} worse"
    yield f"mean of the six tasks is {points('recipe zeda-50'):.2f} (original {points('original'):.2f})"
    untrained = [row["tasks"] for row in skip_rivals(list(rows.values())) if "tokens" not in row]
    best = {text: min(tasks[text] for tasks in untrained) for text in TEXTS}
    assert packaged["code"] < best["code"] and packaged["documentation"] > best["documentation"]
    yield "`skip`, which trains nothing, loses less on documentation"
    longer = [name for name in rows if name.startswith(("halved", "ZEDA"))]
    assert len(longer) == 8 and all(rows[name]["tasks"][text] < best[text] for name in longer for text in TEXTS)
    yield "text is predicted better than by any untrained row"


def readme_claims() -> Iterator[str]:
    found, kills = load("streaming"), load("kill_resume")["kills"]
    run = found["runs"]["prune_75"][0]
    peak = max(run["peak_rss_bytes"], run["peak_rss_bytes_children"])
    assert peak <= found["peak_rss_bytes"]
    most = math.ceil(found["peak_rss_bytes"] / 1e8) / 10
    yield f"checkpoint of {found['checkpoint_bytes'] / 1e9:.1f} GB was pruned with no process above {most:.1f} GB"
    assert all(kill["identical"] for kill in kills)
    yield f"so did all of {len(kills)} that were killed"


def front_page_claims() -> Iterator[str]:
    rows = {row["name"]: row for row in load("tie_reference")["rows"]}
    tied, original = rows["tie-8-distill, more text"], rows["original"]
    lost = [tied["tasks"][text] - original["tasks"][text] for text in TEXTS]
    yield "{:.3f} and {:.3f} bits per byte lost on code and documentation".format(*lost)
    assert beyond_two_errors(tied["tasks"], original["tasks"]) == []
    yield "every other task within two standard errors"
    yield f"{1 - tied['expert_bytes'] / original['expert_bytes']:.1%} fewer bytes of experts".replace("%", " %")
    (whole,) = (
        row["ratio"]
        for row in load("skip_speed")["models"]["rows"]
        if row["model"] == PARTS["whole"] and row["settings"]["batch_size"] == 1
    )
    yield f"prefill {whole['prefill_tokens_per_s']:.2f} times and decoding {whole['decode_tokens_per_s']:.2f} times"


@pytest.mark.parametrize("document", ["README.md", "docs/faq.md"])
def test_what_is_said_to_newcomers_is_so(document: str) -> None:
    text = " ".join((ROOT / document).read_text(encoding="utf-8").split())
    assert not [claim for claim in readme_claims() if claim not in text]


def test_what_the_front_page_says_is_so() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert not [claim for claim in front_page_claims() if claim not in text]


@pytest.mark.parametrize(
    ("document", "claims"), [("expert_skipping", skip_claims), ("merging", merge_claims), ("tying", tie_claims)]
)
def test_what_the_pages_of_methods_say_is_so(document: str, claims: Callable[[], Iterator[str]]) -> None:
    text = " ".join((ROOT / "docs" / f"{document}.md").read_text(encoding="utf-8").split())
    assert not [claim for claim in claims() if claim not in text]


@pytest.mark.parametrize("claims", [prune_claims, quantize_claims, other_claims])
def test_what_is_said_of_the_results_is_so(claims: Callable[[], Iterator[str]]) -> None:
    text = " ".join(BENCHMARKS.read_text(encoding="utf-8").split())
    missing = [claim for claim in claims() if claim not in text]
    assert not missing


def test_no_other_figure_is_typed_by_hand() -> None:
    text = " ".join(MARKS.sub("", BENCHMARKS.read_text(encoding="utf-8")).split())
    for claims in (prune_claims, quantize_claims, other_claims):
        for claim in claims():
            text = text.replace(claim, "")
    assert set(re.findall(r"\d+\.\d+", text)) <= SETTINGS
