"""The work folder of a run and how OUT appears: who may use it, what is refused, and what an interruption leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from moe_compress import workspace
from moe_compress.errors import CheckpointError, DataError, ResumeError, UsageError
from moe_compress.workspace import (
    differences,
    discarded_if_empty,
    explained_disk_errors,
    is_workspace,
    locked,
    open_workspace,
    place,
    places,
    refuse_existing,
    refuse_overlap,
    refuse_unwritable,
    remove_workspace,
    require_space,
)

RUN: dict[str, Any] = {"version": "1", "recipe": {"model": "a", "steps": [{"keep": 0.75}, {"keep": 2}]}}
Usage = namedtuple("Usage", "total used free")


def files(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def begun(folder: Path) -> Path:
    """The work folder of an interrupted run."""
    open_workspace(folder, RUN, resume=False, force=False)
    (folder / "step-0").mkdir()
    (folder / "step-0" / "scores").write_text("measured")
    return folder


def refusal(error: type[Exception], function: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize("resume", [False, True])
def test_new_folder(resume: bool, tmp_path: Path) -> None:
    work = tmp_path / "a" / "work"
    open_workspace(work, RUN, resume=resume, force=False)
    assert json.loads((work / "moe-compress.json").read_text()) == {"tool": "moe-compress", "run": RUN}


def test_unfinished_run_needs_resume_or_force(tmp_path: Path) -> None:
    work = begun(tmp_path / "work")
    before = files(work)
    message = refusal(UsageError, open_workspace, work, RUN, resume=False, force=False)
    assert "--resume" in message and "--force" in message and str(work) in message
    assert files(work) == before
    open_workspace(work, RUN, resume=True, force=False)
    assert files(work) == before
    open_workspace(work, RUN, resume=False, force=True)
    assert list(files(work)) == ["moe-compress.json"]


def test_resume_wins_over_force(tmp_path: Path) -> None:
    work = begun(tmp_path / "work")
    open_workspace(work, RUN, resume=True, force=True)
    assert "step-0/scores" in files(work)


def test_another_run_is_not_continued_and_the_difference_is_said(tmp_path: Path) -> None:
    work = begun(tmp_path / "work")
    before = files(work)
    other = json.loads(json.dumps(RUN))
    other["recipe"]["steps"][1]["keep"] = 3
    other["recipe"]["model"] = "b"
    other["version"] = "2"
    message = refusal(ResumeError, open_workspace, work, other, resume=True, force=False)
    for difference in ('version: "1" -> "2"', 'recipe.model: "a" -> "b"', "recipe.steps.1.keep: 2 -> 3"):
        assert difference in message
    assert "steps.0" not in message and "--force" in message
    assert files(work) == before


def test_differences() -> None:
    assert list(differences({"a": [1, {"b": None}]}, {"a": [1, {"b": None}]})) == []
    assert list(differences({"a": [1]}, {"a": [1, 2]})) == ["a: [1] -> [1, 2]"]
    assert list(differences({"a": {"b": 1}}, {"a": 1, "c": 2})) == ['a: {"b": 1} -> 1', "c: null -> 2"]


@pytest.mark.parametrize("marks", [{}, {"run.json": "{}"}, {"moe-compress.json": "{}"}, {"moe-compress.json": "x"}])
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"force": True}])
def test_foreign_folder_is_never_touched(marks: dict[str, str], options: dict[str, bool], tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for name, text in (marks | {"thesis.tex": "years of work"}).items():
        (work / name).write_text(text)
    before = files(work)
    message = refusal(UsageError, open_workspace, work, RUN, **{"resume": False, "force": False} | options)
    assert "--work" in message and files(work) == before and not is_workspace(work)
    with pytest.raises(UsageError, match="choose another with --work"), locked(work):
        pass
    assert files(work) == before


def test_two_processes_do_not_share_a_work_folder(tmp_path: Path) -> None:
    """The second one is told which the first one is; the lock goes with that, even when it is killed."""
    work = begun(tmp_path / "work")
    code = "import sys, time; from pathlib import Path; from moe_compress.workspace import locked\n"
    code += "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    line = [sys.executable, "-c", code, str(work)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        for option, advice in ((" with --work", "another folder with --work."), ("", "choose another folder.")):
            message = f"in use by process {other.pid};.*{advice}"
            with pytest.raises(UsageError, match=message), locked(work, option=option):
                pass
        other.kill()
    with locked(work):
        open_workspace(work, RUN, resume=False, force=True)
        assert set(files(work)) == {"moe-compress.json", "moe-compress.lock"}
        remove_workspace(work)
    assert not work.exists()


def test_folders_inside_one_another_are_refused(tmp_path: Path) -> None:
    inside, link = tmp_path / "a" / "b", tmp_path / "link"
    inside.mkdir(parents=True)
    link.symlink_to(tmp_path / "a")
    refuse_overlap({"OUT": tmp_path / "a", "the model": tmp_path / "ab"})
    for other in (tmp_path / "a", inside, tmp_path, link, link / "b" / "c", inside / ".."):
        message = refusal(UsageError, refuse_overlap, {"OUT": tmp_path / "a", "the model": other})
        assert message.startswith("OUT (") and "the model (" in message


def test_killed_while_it_was_made(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    open_workspace(work, RUN, resume=True, force=False)
    (work / "moe-compress.json").rename(work / "moe-compress.json.part")
    open_workspace(work, RUN, resume=True, force=False)
    assert list(files(work)) == ["moe-compress.json"]


def test_killed_while_it_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before every removal, it is still known as a work folder until nothing is left in it."""
    original = os.unlink, os.rmdir
    for stop in range(100):
        work = begun(tmp_path / str(stop))
        (work / "step-1").mkdir()
        (work / "step-1" / "a").write_text("")
        left = [stop]

        def counted(remove: Any, left: list[int] = left) -> Any:
            def call(*args: Any, **options: Any) -> None:
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                remove(*args, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", counted(original[0]))
            patch.setattr(os, "rmdir", counted(original[1]))
            try:
                remove_workspace(work)
            except KeyboardInterrupt:
                assert work.exists()
            else:
                break
        open_workspace(work, RUN, resume=False, force=True)
        assert list(files(work)) == ["moe-compress.json"]
    assert stop == 7 and not work.exists()


def test_existing_out_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse_existing(out, force=False)
    out.mkdir()
    assert "--force" in refusal(UsageError, refuse_existing, out, force=False)
    refuse_existing(out, force=True)
    (out / "thesis.tex").write_text("years of work")
    for manifest in (None, "{}", '{"tool": "another 1.0"}', "damaged"):
        if manifest is not None:
            (out / "manifest.json").write_text(manifest)
        assert "not made by moe-compress" in refusal(UsageError, refuse_existing, out, force=True)
    (out / "manifest.json").write_text('{"tool": "moe-compress 0.1.0"}')
    refuse_existing(out, force=True)
    shutil.rmtree(out)
    out.write_text("")
    assert "--force" in refusal(UsageError, refuse_existing, out, force=False)
    assert "not a folder" in refusal(UsageError, refuse_existing, out, force=True)
    assert "does not exist" in refusal(UsageError, refuse_existing, tmp_path / "no" / "out", force=False)


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "model").write_text(text)
    return path


@pytest.mark.parametrize("other_disk", [False, True])
def test_place_keeps_the_old_until_the_new_is_complete(
    other_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step of the way there is a whole old or a whole new folder."""
    if other_disk:
        monkeypatch.setattr(workspace, "same_disk", lambda one, other: False)
    out, finished = folder(tmp_path / "out", "old"), folder(tmp_path / "finished", "new")
    seen: list[set[str]] = []

    def watched(original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            seen.append({(path / "model").read_text() for path in tmp_path.iterdir() if (path / "model").exists()})
            assert not out.exists() or files(out) in ({"model": "old"}, {"model": "new"})
            return original(*args, **options)

        return call

    for owner, name in ((Path, "rename"), (Path, "mkdir"), (shutil, "copyfile"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    place(finished, out)
    assert files(out) == {"model": "new"}
    assert {path.name for path in tmp_path.iterdir()} == ({"out", "finished"} if other_disk else {"out"})
    assert len(seen) >= 4 and all(state == {"old", "new"} for state in seen), "the old one is removed last"


def test_place_without_an_older_one(tmp_path: Path) -> None:
    place(folder(tmp_path / "finished", "new"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and files(tmp_path / "out") == {"model": "new"}


def test_failed_copy_to_another_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, finished = folder(tmp_path / "out", "old"), folder(tmp_path / "finished", "new")
    monkeypatch.setattr(workspace, "same_disk", lambda one, other: False)

    def full(source: Path, target: Path) -> None:
        target.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match=f"{tmp_path} is full"):
        place(finished, out)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "finished"}
    assert files(out) == {"model": "old"} and files(finished) == {"model": "new"}


def test_places_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert places(Path("a"), None) == (tmp_path / "a", tmp_path / "a.work")
    assert places(Path(), Path("w")) == (tmp_path, tmp_path / "w")
    assert "no place for a result" in refusal(UsageError, places, Path("/"), None)


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unwritable(tmp_path / "a" / "b")
    assert "/proc (No such file or directory); choose another" in refusal(
        UsageError, refuse_unwritable, Path("/proc/a/b")
    )
    (tmp_path / "file").touch()
    assert "file is not a folder" in refusal(UsageError, refuse_unwritable, tmp_path / "file" / "a")

    def refused(path: str, mode: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "mkdir", refused)
    assert f"in {tmp_path} (Permission denied);" in refusal(UsageError, refuse_unwritable, tmp_path / "a" / "b")


def test_too_little_space_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(10**10, 0, 2 * 10**9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    require_space(tmp_path / "a" / "b", 2 * 10**9)
    assert asked == [tmp_path], "the nearest folder that exists"
    message = refusal(CheckpointError, require_space, tmp_path, 3 * 10**9)
    assert "3.00 GB" in message and "2.00 GB" in message and "--work" in message


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x"), SafetensorError(FULL)])
def test_full_disk_is_a_sentence(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is full; .*--resume"), explained_disk_errors(tmp_path):
        raise error
    with pytest.raises(CheckpointError, match=r"space and do so\.$"), explained_disk_errors(tmp_path, "do so"):
        raise error


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "x"), SafetensorError("HeaderTooLarge")])
def test_other_errors_pass(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)), explained_disk_errors(tmp_path):
        raise error


def test_an_error_before_any_work_leaves_no_work_folder(tmp_path: Path) -> None:
    for failure, left in ((DataError("no such dataset."), False), (ZeroDivisionError(), True)):
        work = tmp_path / type(failure).__name__
        open_workspace(work, RUN, resume=False, force=False)
        with pytest.raises(type(failure)), discarded_if_empty(work):
            raise failure
        assert work.exists() == left, "an error of the program itself is kept for a look"
    work = begun(tmp_path / "work")
    with pytest.raises(DataError), discarded_if_empty(work):
        raise DataError("no such dataset.")
    assert "step-0/scores" in files(work)
