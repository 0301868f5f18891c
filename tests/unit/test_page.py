"""The page: every figure is on it, nothing of others' runs in it, what is missing is absent, and several compare."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_compress.report.page import write_page
from tests.parsed_page import Parsed, page_of
from tests.results import OTHER_TASKS, made, manifest, plan, report_of, write_result

HOSTILE = """<script>alert("1")</script><img src=x onerror='alert(2)'>&amp;</style>--></script> {{ 71 * 73 }}"""


def numbers(content: Any) -> Iterator[int | float]:
    """Every number in JSON-able content."""
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from numbers(value)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield content


# ------------------------------------------------------------------------------------------------------------ contents


def test_every_figure_of_the_report_is_on_the_page(tmp_path: Path) -> None:
    report = report_of()
    page = page_of(write_result(tmp_path / "out"))
    found = {float(value) for value in page.figures}
    parts = ("baseline", "compressed", "ratio", "recovery", "recovery_by_metric", "random", "random_summary")
    wanted = {float(number) for part in parts for number in numbers(report[part])}
    wanted |= {float(number) for number in numbers(report["settings"]) if number != 17}
    assert len(wanted) > 50
    assert wanted - found == set()
    assert "layer 3, expert 17" in page.text, "starved experts are named"


def test_every_figure_stands_in_its_own_cell(tmp_path: Path) -> None:
    """The table of all figures, cell by cell, against the report."""
    report = report_of()
    text = write_page([write_result(tmp_path / "out")]).read_text(encoding="utf-8")
    rows = {}
    for line in re.findall(r'<tr><th scope="row">.*?</tr>', text[text.index('<section id="figures">') :]):
        path, _, *cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line)
        values = [re.findall(r'value="([^"]*)"', cell) for cell in cells]
        rows.setdefault(path, [float(value[0]) if value else None for value in values])
    columns = [report["baseline"], report["compressed"], report["ratio"], *report["random"]]
    checked = 0
    for number, column in enumerate(columns):
        for path, value in leaves(column):
            if path == ("seed",):
                continue
            cells = rows[" · ".join(path)]
            assert len(cells) == len(columns) and cells[number] == value, path
            checked += 1
    assert checked > 70


def leaves(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number of nested objects under its path of keys."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (*path, key), value


def test_the_headline_says_from_what_to_what(tmp_path: Path) -> None:
    text = page_of(write_result(tmp_path / "out")).text
    assert "org/model, 25.0 % smaller" in text
    assert "From 13.8 GB to 10.4 GB with prune (reap), then quantize (gptq, 4 bits)." in text
    assert "keeps between 75.0 % (arc_easy) and 80.0 % (code), over 2 tasks" in text
    assert "mean of 2 tasks worst: 75.0 ± 1.2 %, arc_easy" in text
    assert "3 of 3 metrics better than the mean of 3 random prunings" in text
    assert "5 of 5 checks passed" in text


@pytest.mark.parametrize(
    ("ratio", "said"), [(1.0, "org/model"), (0.5, "org/model, 50.0 % smaller"), (1.25, "org/model, 25.0 % larger")]
)
def test_the_title_follows_the_size(tmp_path: Path, ratio: float, said: str) -> None:
    report = report_of()
    report["ratio"]["stored_bytes"] = ratio
    page = page_of(write_result(tmp_path / "out", report))
    assert [data for tag, data in page.texts if tag in ("title", "h1")] == [said, said]


def test_measured_and_derived_are_told_apart(tmp_path: Path) -> None:
    page = (write_page([write_result(tmp_path / "out")])).read_text(encoding="utf-8")
    rows = {
        " ".join(re.sub("<[^>]*>", " ", row).split()[:4]): row
        for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL)
        if 'class="marked"' in row
    }
    kinds = {label: set(re.findall(r'class="kind (\w+)"', row)) for label, row in rows.items()}
    assert kinds["measured stored size 13.8"] == {"measured"}
    assert kinds["derived total parameters 6.92"] == {"derived"}


def test_a_failed_check_is_the_first_thing_said(tmp_path: Path) -> None:
    report = report_of()
    report["checks"]["keys"] = {"passed": False, "detail": "`a.weight` is missing."}
    page = page_of(write_result(tmp_path / "out", report))
    assert "Verification failed: keys. This checkpoint is not what was asked for" in page.text
    assert "failed: `a.weight` is missing." in page.text
    assert "4 of 5 checks passed" in page.text
    assert [attributes for attributes in page.all("p") if attributes.get("role") == "alert"]
    assert "alert" not in {a.get("role") for a in page_of(write_result(tmp_path / "well")).all("p")}


def test_experts_figures_are_in_the_page(tmp_path: Path) -> None:
    page = page_of(write_result(tmp_path / "out"))
    (content,) = (data for tag, data in page.texts if tag == "script" and data.lstrip().startswith('{"columns"'))
    store = json.loads(content)
    assert (store["layers"], store["columns"]) == ([1, 3], 4)
    facts = {fact["title"]: fact["texts"] for fact in store["facts"]}
    assert facts["Step 1: traffic"][1][2] == "30 tokens, 30.0 %"
    assert facts["Step 1: score (reap)"][0] == [
        "4 (rank 1 of 4)", "0.5 (rank 4 of 4)", "3 (rank 2 of 4)", "2 (rank 3 of 4)",
    ]  # fmt: skip
    assert facts["Step 1: outcome"][0] == ["kept, a super expert", "dropped", "kept", "kept"]
    assert facts["Step 2: bits per weight"] == [["4 bits", "", "2 bits", "4 bits"], ["2 bits", "2 bits", "4 bits", ""]]


# ------------------------------------------------------------------------------------------------------------- hostile


def saying(content: Any, text: str) -> Any:
    """The content with every text replaced; numbers and structure stay."""
    if isinstance(content, dict):
        return {key: saying(value, text) for key, value in content.items()}
    if isinstance(content, list):
        return [saying(value, text) for value in content]
    return text if isinstance(content, str) else content


def result_saying(folder: Path, said: str) -> Path:
    """A result in which all that others can name is called this."""
    report = report_of()
    for key in ("settings", "checks"):
        report[key] = saying(report[key], said)
    text = json.dumps(report).replace('"arc_easy"', json.dumps(said)).replace('"acc"', json.dumps(f"{said}2"))
    steps = plan()
    steps["steps"][0] |= {"summary": [said], "maps": [{"title": said, "note": said, "values": {"1": [1, 2, 3, 4]}}]}
    return write_result(folder, json.loads(text), steps, saying(manifest(), said), recipe=f"model: {said}\n")


def test_hostile_texts_are_only_texts(tmp_path: Path) -> None:
    """The same elements with the same attributes as if the texts were harmless."""
    pages = []
    for name, said in (("harmless", "plain words"), ("<b>hostile", HOSTILE)):
        folders = [result_saying(tmp_path / name, said), result_saying(tmp_path / f"{name} 2", said)]
        compared = write_page(folders, tmp_path / f"{len(said)}.html").read_text(encoding="utf-8")
        pages.append([page_of(folders[0]), Parsed(compared)])
    for harmless, hostile in zip(*pages, strict=True):
        assert hostile.errors == []
        kinds = [
            [(tag, sorted(attributes)) for tag, attributes in page.elements if tag != "wbr"]
            for page in (harmless, hostile)
        ]
        assert kinds[0] == kinds[1]
        assert "5183" not in hostile.text.split(), "nothing in a record is a template"
    page = pages[1][0]
    assert [data for tag, data in page.texts if tag == "h1"] == [f"{HOSTILE}, 25.0 % smaller"]
    assert f"model: {HOSTILE}" in "".join(data for tag, data in page.texts if tag == "pre")
    (content,) = (data for tag, data in page.texts if tag == "script" and '"facts"' in data)
    assert f"Step 1: {HOSTILE}" in {fact["title"] for fact in json.loads(content)["facts"]}


@pytest.mark.parametrize("several", [False, True])
def test_the_page_loads_nothing_and_its_policy_is_its_own(tmp_path: Path, several: bool) -> None:
    folders = [write_result(tmp_path / "a"), write_result(tmp_path / "b")][: 1 + several]
    text = write_page(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Parsed(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "poster", "srcset"):
            link = attributes.get(name)
            assert link is None or link.startswith("#") or link == "data:,", (tag, attributes)
        assert "style" not in attributes, "the policy would not let it"
    assert not re.search(r"@import|url\(|https?://", text)
    (policy,) = (a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    hashes = [
        base64.b64encode(
            hashlib.sha256(re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[0].encode()).digest()
        ).decode()
        for tag in ("style", "script")
    ]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
    )
    anchors = [a["href"] for a in page.all("a")]
    assert len(anchors) > 5 and {f"#{name}" for name in page.ids} >= set(anchors)


# ----------------------------------------------------------------------------------------------------- what is missing


def sections(page: Parsed) -> set[str]:
    return {attributes["id"] or "" for attributes in page.all("section")}


ALL = {
    "result",
    "quality",
    "frontier",
    "experts",
    "parts",
    "calibration",
    "checks",
    "recipe",
    "provenance",
    "limits",
    "figures",
}


def test_a_whole_result_has_every_section(tmp_path: Path) -> None:
    assert sections(page_of(write_result(tmp_path / "out"))) == ALL


@pytest.mark.parametrize(
    ("gone", "absent"),
    [
        ("plan.json", {"experts"}),
        ("experts.json", set()),
        ("manifest.json", set()),
        ("recipe.yaml", set()),
        ("report.json: settings.calibration", {"calibration"}),
        ("report.json: checks", {"checks"}),
        ("report.json: compressed.flops_by_part", set()),
        ("report.json: compressed.bytes_by_part", set()),
    ],
)
def test_a_part_that_is_missing_is_absent(tmp_path: Path, gone: str, absent: set[str]) -> None:
    report = report_of()
    file, _, path = gone.partition(": ")
    if path:
        inner = report
        *way, last = path.split(".")
        for key in way:
            inner = inner[key]
        inner[last] = {}
    folder = write_result(tmp_path / "out", report)
    if not path:
        (folder / file).unlink()
    if file in ("plan.json", "experts.json"):
        (folder / "experts.json").unlink(missing_ok=True)
    page = page_of(folder)
    assert sections(page) == ALL - absent
    for attributes in page.all("a"):
        assert (attributes["href"] or "").removeprefix("#") in page.ids
    titles = {data for tag, data in page.texts if tag == "h3"}
    assert ("FLOPs per token" in titles) == (path != "compressed.flops_by_part")
    assert ("Stored bytes" in titles) == (path != "compressed.bytes_by_part")
    assert any("traffic" in title for title in titles) == (file not in ("plan.json", "experts.json"))
    assert ("experts.json" in page.text) == (file not in ("plan.json", "experts.json"))


def test_a_bare_report_has_what_it_has(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report_of(bare=True)))
    page = page_of(folder)
    assert sections(page) == {"result", "limits", "figures"}
    assert "Quality was not compared" in page.text
    assert not {"None", "undefined", "nan"} & set(page.text.split())
    assert page.all("svg") == []
    assert "stored size 1 kB 750 B 75.0 %" in page.text


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    report = report_of()
    del report["compressed"]["speed"], report["ratio"]["speed"]
    page = page_of(write_result(tmp_path / "out", report))
    assert "decode speed 21.9 tokens/s not measured -" in page.text
    assert "Decode speed" not in page.text


# ------------------------------------------------------------------------------------------------------------- several


def test_several_results_on_one_page(tmp_path: Path) -> None:
    small = made(0.5, 0.74, 0.7)
    worse = made(0.75, 0.7, 0.6)
    folders = [
        write_result(tmp_path / "good"),
        write_result(tmp_path / "small", small, recipe_settings={"keep": 0.5}),
        write_result(tmp_path / "worse", worse, recipe_settings={"criterion": "frequency"}),
    ]
    page = Parsed(write_page(folders, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.errors == [] and len(set(page.ids)) == len(page.ids)
    assert "3 checkpoints of org/model" in page.text
    assert "A, B stand on the frontier of size and quality" in page.text
    for name in ("good", "small", "worse"):
        assert name in page.text
    tips = [attributes["data-tip"] or "" for attributes in page.all("g") if "data-tip" in attributes]
    dominated = [tip for tip in tips if "dominated by" in tip]
    assert [tip.partition(":")[0] for tip in dominated] == ["worse"] and "dominated by good" in dominated[0]
    assert "C worse prune (reap), then quantize (gptq, 4 bits) 65.0 % 60.0 % (code) A (good) 5 of 5" in page.text
    found = {float(value) for value in page.figures}
    for report in (report_of(), small, worse):
        for part in ("compressed", "ratio", "recovery"):
            assert {float(number) for number in numbers(report[part])} <= found
    assert "steps.0.keep 0.75 0.5 0.75" in page.text and "steps.0.criterion reap reap frequency" in page.text
    assert "steps.0.op" not in page.text, "what is the same is not listed"
    assert "Not evaluated alike" not in page.text


def test_a_result_that_chance_beats_is_dominated_by_it(tmp_path: Path) -> None:
    bad = made(0.75, 0.3, 0.3, draws=True)
    page = Parsed(
        write_page(
            [write_result(tmp_path / "bad", bad), write_result(tmp_path / "good")], tmp_path / "p.html"
        ).read_text()
    )
    assert re.search(r"A bad .* 30\.0 ± 0\.5 % \(arc_easy\) B \(good\) 5 of 5", page.text)
    alone = page_of(tmp_path / "bad")
    (tip,) = {a["data-tip"] for a in alone.all("g") if "dominated by" in (a.get("data-tip") or "")}
    assert "dominated by random pruning, seed" in (tip or "") and "beside" not in (tip or "")
    assert any("random pruning, seed 0, beside bad:" in (a.get("data-tip") or "") for a in page.all("g"))


def test_other_evaluations_and_other_models_are_told(tmp_path: Path) -> None:
    other = report_of()
    other["settings"]["eval"]["limit"] = 50
    other["settings"]["model"] = "org/other"
    changed = manifest()
    changed["source"]["revision"] = "another"
    folders = [write_result(tmp_path / "a"), write_result(tmp_path / "b", other, manifest_content=changed)]
    text = Parsed(write_page(folders, tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "2 checkpoints stand" not in text and "org/model" in text and "org/other" in text
    assert "Not evaluated alike: limit differ" in text
    assert "stored size as a share of each one's original" in text


def test_a_copied_source_is_the_same_source(tmp_path: Path) -> None:
    """Of a local folder the fingerprint holds when its files were written."""
    copied = manifest()
    copied["source"]["fingerprint"] = "another"
    folders = [write_result(tmp_path / "a"), write_result(tmp_path / "b", manifest_content=copied)]
    text = Parsed(write_page(folders, tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "by stored size (measured)" in text


def test_results_without_a_shared_task_have_no_frontier(tmp_path: Path) -> None:
    folders = [write_result(tmp_path / "a"), write_result(tmp_path / "b", made(0.5, 0.5, 0.5, tasks=OTHER_TASKS))]
    page = Parsed(write_page(folders, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "frontier" not in page.ids and "They share no task" in page.text
    assert {"results", "costs", "quality", "checks", "figures"} <= set(page.ids)


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
    folders = [write_result(tmp_path / "x" / "out"), write_result(tmp_path / "y" / "out")]
    text = Parsed(write_page(folders, tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "x/out" in text and "y/out" in text and str(tmp_path) not in text
