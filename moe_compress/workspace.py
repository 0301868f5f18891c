"""The folder a run works in until its result is complete, and how the result appears.

`OUT.work` holds the state of one run and belongs to it alone: `run.json` says which run, and another one is refused.
`OUT` appears by one rename; with `force`, an older `OUT` stays until that moment.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_compress.checkpoint.writer import write_json
from moe_compress.errors import CheckpointError, ResumeError, UsageError

RUN_FILE = "run.json"


def open_workspace(folder: Path, identity: Mapping[str, Any], *, resume: bool, force: bool) -> None:
    """Create the work folder of a run, or continue the one there.

    `identity` is everything that decides the run's result. Raises `UsageError` when an unfinished run is there and
    neither `resume` nor `force` was given, `ResumeError` naming what differs when it is another run.
    """
    state = folder / RUN_FILE
    if folder.exists() and any(folder.iterdir()) and not state.exists():
        raise UsageError(f"{folder} exists and is no work folder of moe-compress; choose another with --work.")
    if state.exists() and not resume:
        if not force:
            raise UsageError(
                f"{folder} holds an unfinished run; continue it with --resume, or start over with --force."
            )
        shutil.rmtree(folder)
    if state.exists():
        differing = list(differences(json.loads(state.read_text()), json.loads(json.dumps(identity))))
        if differing:
            raise ResumeError(
                f"{folder} was begun by another run and cannot be continued; start over with --force. "
                f"Different: {'; '.join(differing)}."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(state, identity)


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """`path: before -> now` for every value that differs between two JSON contents."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for position, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, f"{path}.{position}")
    elif before != now:
        yield f"{path}: {json.dumps(before)} -> {json.dumps(now)}"


def refuse_existing(out: Path, force: bool) -> None:
    """Raise `UsageError` when OUT is there and may not be replaced, or cannot be made."""
    if out.exists() and not force:
        raise UsageError(f"{out} exists; choose another folder, or replace it with --force.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is not a folder; choose another name.")
    if not out.parent.is_dir():
        raise UsageError(f"the folder {out.parent} does not exist; create it first.")


def require_space(folder: Path, needed: int) -> None:
    """Raise `CheckpointError` when fewer than `needed` bytes are free where `folder` lies."""
    present = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(present).free
    if free < needed:
        raise CheckpointError(
            f"this run needs about {needed / 1e9:.2f} GB at {folder}, but only {free / 1e9:.2f} GB are free there; "
            "free some space, or choose another place with --work."
        )


@contextmanager
def explained_disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(f"the disk of {folder} is full; free some space and continue with --resume.") from None


def place(finished: Path, out: Path) -> None:
    """Make the finished folder appear as OUT by a rename; an older OUT is removed after that."""
    if finished.stat().st_dev != out.parent.stat().st_dev:
        near = out.with_name(f".{out.name}.incoming")
        shutil.rmtree(near, ignore_errors=True)
        shutil.copytree(finished, near)
        finished = near
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    os.rename(finished, out)
    shutil.rmtree(old, ignore_errors=True)
