"""`moe-compress report`: where pages go, what is refused, and how numbers and settings are written."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moe_compress
from moe_compress.cli import app
from moe_compress.errors import CheckpointError, UsageError
from moe_compress.report.page import plain, tight, words, write_page
from tests.parsed_page import page_of
from tests.results import CHECKS, experts, report_of, write_result


def test_where_pages_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = write_result(tmp_path / "a"), write_result(tmp_path / "b")
    assert write_page([first]) == first / "report.html"
    before = (first / "report.html").read_bytes()
    assert write_page([first]).read_bytes() == before, "the same records, the same page"
    assert moe_compress.write_page(first, str(second)) == Path("comparison.html")
    assert (tmp_path / "comparison.html").exists()
    done = CliRunner().invoke(app, ["report", str(first), "--output", "mine.html"])
    assert (done.exit_code, done.stdout) == (0, "report: mine.html\n")
    assert (tmp_path / "mine.html").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))


def test_refusals_are_one_sentence_and_leave_nothing(tmp_path: Path) -> None:
    good = write_result(tmp_path / "good")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    damaged = write_result(tmp_path / "damaged")
    (damaged / "report.json").write_text('{"format": 1')
    older = write_result(tmp_path / "older", report_of() | {"format": 0})
    list_plan = write_result(tmp_path / "list")
    (list_plan / "plan.json").write_text('{"steps": {}}')
    cases: list[tuple[list[Path], str | None, int, str]] = [
        ([good, good], None, 2, "named twice"),
        ([tmp_path / "nothing"], None, 2, "is not a folder"),
        ([tmp_path / "empty"], None, 2, "holds no report.json"),
        ([good], "notes.txt", 2, "is no page of moe-compress"),
        ([good], "empty", 2, "is a folder"),
        ([good], "no/where.html", 2, "does not exist"),
        ([damaged], None, 1, "report.json is damaged"),
        ([older], None, 1, "report.json is damaged, or was written by another version"),
        ([list_plan], None, 1, "plan.json is damaged"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for folders, output, code, said in cases:
        arguments = ["report", *map(str, folders)] + (["--output", str(tmp_path / output)] if output else [])
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == code, said
        assert said in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UsageError):
        write_page([tmp_path / "empty"])
    with pytest.raises(CheckpointError):
        write_page([damaged])


def test_the_page_of_a_result_may_be_written_again(tmp_path: Path) -> None:
    folder = write_result(tmp_path / "out")
    write_page([folder])
    report = copy.deepcopy(report_of())
    report["checks"] = CHECKS | {"extra": {"passed": True, "detail": "one more"}}
    (folder / "report.json").write_text(json.dumps(report))
    assert "6 of 6 checks passed" in page_of(folder).text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (24193536, "24,193,536"),
        (4.0, "4"),
        (0.9634366, "0.96344"),
        (150.41262, "150.41"),
        (8248203.6, "8,248,204"),
    ],
)
def test_numbers_as_they_are_read(value: float, text: str) -> None:
    assert plain(value) == text


def test_settings_as_they_are_read() -> None:
    assert words({"a": True, "b": [1, None], "c": {}, "d": None}) == "a yes, b 1, none, c none"
    assert tight("33.0 % of 24.2 MB ± 6.1 %") == "33.0\u00a0% of 24.2\u00a0MB ±\u00a06.1\u00a0%"


def test_the_records_used_in_the_tests_are_like_real_ones() -> None:
    assert {entry["layer"] for entry in experts()["steps"][0]["layers"]} == {1, 3}
