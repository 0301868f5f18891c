"""Kills a run just before one of its file operations, resumes it, and says what was there in between and at the end.

A scenario holds `recipe`, `options` of `run`, whether an older OUT is there (`old`), how many `kills` to spread over
the operations, and a `seed`: every second kill is followed by another one during the resume. Each run that is killed is
a fork of this process, which has made the whole run before, so that all libraries are imported; it dies by SIGKILL.

Not covered: files half written by native code, which all have temporary names until they are whole.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_compress import pipeline
from moe_compress.recipe import load_recipe

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
OLD = {"model": b"an older result", "manifest.json": b'{"tool": "moe-compress 0.0.1"}'}


def in_child(action: Callable[[], Any]) -> int:
    """The exit status of a fork that does `action`; negative for the signal that ended it."""
    pid = os.fork()
    if not pid:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def on_file_operations(folder: Path, act: Callable[[], None]) -> None:
    """Call `act` before everything that changes what lies in `folder`; for the rest of this process."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        opened = (
            event == "open" and isinstance(args[0], str) and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if (event in CHANGES or opened) and (str(folder) in str(args[0]) or not os.path.isabs(str(args[0]))):
            act()

    sys.addaudithook(hook)


def content(folder: Path) -> dict[str, bytes]:
    """All files below `folder`."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Crashes:
    """One scenario."""

    def __init__(self, folder: Path, scenario: dict[str, Any]) -> None:
        self.folder, self.scenario = folder, scenario
        self.recipe = load_recipe(scenario["recipe"])

    def start(self, name: str) -> Path:
        """A folder of its own for one run; returns its OUT."""
        out = self.folder / name / "out"
        out.parent.mkdir()
        if self.scenario["old"]:
            out.mkdir()
            for file, data in OLD.items():
                (out / file).write_bytes(data)
        return out

    def run(self, out: Path, *, kill_at: int | None = None, resume: bool = False, count: Path | None = None) -> int:
        """One run in a fork; killed before operation `kill_at`, or all operations counted into a file."""

        def work() -> None:
            done = 0

            def act() -> None:
                nonlocal done
                if done == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1

            on_file_operations(out.parent, act)
            pipeline.run(self.recipe, out, resume=resume, **self.scenario["options"])
            if count is not None:
                os.write(os.open(count, os.O_CREAT | os.O_WRONLY), str(done).encode())

        return in_child(work)

    def between(self, out: Path, new: dict[str, bytes]) -> str:
        """What a killed run left at OUT: `nothing`, `old` or `new`; anything else is named by its files."""
        hidden = out.with_name(f".{out.name}.old")
        found = content(out) if out.exists() else {}
        if found == new:
            return "new"
        if not self.scenario["old"]:
            return "nothing" if not out.exists() else f"{sorted(found)}"
        kept = OLD in (found, content(hidden) if hidden.exists() else {})
        return "old" if kept else f"{sorted(found)}"

    def all(self) -> dict[str, Any]:
        reference = self.start("uninterrupted")
        pipeline.run(self.recipe, reference, **self.scenario["options"])
        expected = content(reference)
        count, again = self.folder / "operations", self.start("again")
        assert self.run(again, count=count) == 0 and content(again) == expected
        operations = int(count.read_text())
        rng = random.Random(self.scenario["seed"])
        kills = []
        for number in range(self.scenario["kills"]):
            moment = round((number + 0.5) / self.scenario["kills"] * (operations - 1))
            out = self.start(str(moment))
            statuses = [self.run(out, kill_at=moment)]
            between = [self.between(out, expected)]
            if number % 2:
                statuses.append(self.run(out, kill_at=rng.randrange(operations - moment), resume=True))
                between.append(self.between(out, expected))
            last = self.run(out, resume=True)
            found = content(out) if out.exists() else {}
            kills.append({
                "moment": moment,
                "statuses": statuses,
                "between": between,
                "last": last,
                "different": sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name)),
                "left": sorted(entry.name for entry in out.parent.iterdir() if entry != out),
            })  # fmt: skip
            shutil.rmtree(out.parent)
        return {"operations": operations, "files": sorted(expected), "kills": kills}


def killed_and_resumed(folder: Path, **scenario: Any) -> dict[str, Any]:
    """A scenario in which every run dies as it should, ends with the bits of an uninterrupted one, leaves nothing."""
    folder.mkdir()
    answer = Crashes(folder, {"options": {}, "old": False, "seed": 0} | scenario).all()
    assert len({kill["moment"] for kill in answer["kills"]}) == scenario["kills"]
    for kill in answer["kills"]:
        assert kill["statuses"][0] == -signal.SIGKILL and kill["last"] == 0, kill
        assert kill["different"] == [] and kill["left"] == [], kill
    return answer
