"""The folder a run works in until its result is complete, and how the result appears.

`OUT.work` holds the state of one run and belongs to it alone: `moe-compress.json` says which run, and another one is
refused; a lock keeps a second process out. `OUT` appears by one rename; with `force`, an older `OUT` stays until that
moment. Nothing is removed but what this program made.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from moe_compress.checkpoint.durable import replace_durably, sync
from moe_compress.checkpoint.writer import write_json
from moe_compress.errors import CheckpointError, MoECompressError, ResumeError, UsageError
from moe_compress.verification.checks import MANIFEST_FILE

TOOL = "moe-compress"
RUN_FILE = "moe-compress.json"
LOCK_FILE = "moe-compress.lock"
BEGUN = {f"{RUN_FILE}.part", LOCK_FILE}  # all that is there when a run is killed at its very beginning


def places(out: Path, work: Path | None) -> tuple[Path, Path]:
    """OUT and the work folder, in full; `UsageError` when OUT is the root of all folders."""
    out = out.absolute()
    if not out.name:
        raise UsageError(f"{out} is no place for a result; choose a folder in it.")
    return out, (work or out.with_name(f"{out.name}.work")).absolute()


def refuse_overlap(folders: Mapping[str, Path]) -> None:
    """Raise `UsageError` when one of these named folders is, or lies in, another: they would destroy each other."""
    places = [(name, folder.resolve()) for name, folder in folders.items()]
    for (name, one), (other_name, other) in combinations(places, 2):
        if one == other or one in other.parents or other in one.parents:
            raise UsageError(
                f"{name} ({one}) and {other_name} ({other}) must be two folders, none inside the other; choose another."
            )


@contextmanager
def locked(folder: Path, *, option: str = " with --work") -> Iterator[None]:
    """Keep other processes out of a work folder; `UsageError` naming the process that uses it already.

    The lock goes with the process that holds it, however that ends. `option` says how to choose another folder.
    """
    _refuse_foreign(folder, option)
    refuse_unwritable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"{folder} is in use by process {file.read()}; wait until that has ended, or choose another "
                f"folder{option}."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def open_workspace(
    folder: Path, identity: Mapping[str, Any], *, resume: bool, force: bool, option: str = " with --work"
) -> None:
    """Create the work folder of a run, or continue the one there.

    `identity` is everything that decides the run's result. Raises `UsageError` when an unfinished run is there and
    neither `resume` nor `force` was given, `ResumeError` naming what differs when it is another run.
    """
    state = folder / RUN_FILE
    _refuse_foreign(folder, option)
    if state.exists() and not resume:
        if not force:
            raise UsageError(
                f"{folder} holds an unfinished run; continue it with --resume, or start over with --force."
            )
        _empty(folder)
    if state.exists():
        before = json.loads(state.read_text(encoding="utf-8"))["run"]
        differing = list(differences(before, json.loads(json.dumps(identity))))
        if differing:
            raise ResumeError(
                f"{folder} belongs to another run and cannot be continued; choose another folder, or start over with "
                f"--force. Different: {'; '.join(differing)}."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(state, {"tool": TOOL, "run": identity})


def is_workspace(folder: Path) -> bool:
    """Whether this is the work folder of a run, or holds no more than one at its very beginning."""
    content = _json(folder / RUN_FILE)
    if isinstance(content, dict) and content.get("tool") == TOOL and "run" in content:
        return True
    return folder.is_dir() and {entry.name for entry in folder.iterdir()} <= BEGUN


def remove_workspace(folder: Path) -> None:
    """Remove a work folder; what marks it as one goes last, so that a removal cut short can be repeated."""
    _empty(folder)
    (folder / LOCK_FILE).unlink(missing_ok=True)
    folder.rmdir()


def _empty(folder: Path) -> None:
    """Remove all of a work folder but its lock, the mark last."""
    kept = {RUN_FILE, LOCK_FILE}
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in kept:
            entry.unlink()
    (folder / RUN_FILE).unlink(missing_ok=True)


def _refuse_foreign(folder: Path, option: str) -> None:
    """Raise `UsageError` when there is something here that no run of this program made."""
    if folder.exists() and not is_workspace(folder):
        raise UsageError(f"{folder} exists and is no work folder of moe-compress; choose another{option}.")


def _json(file: Path) -> Any:
    """The content of a JSON file, or None where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def discarded_if_empty(folder: Path) -> Iterator[None]:
    """Remove the work folder after an error before anything was done, so that a corrected recipe can start at once."""
    try:
        yield
    except MoECompressError:
        if {entry.name for entry in folder.iterdir()} <= {RUN_FILE, LOCK_FILE}:
            remove_workspace(folder)
        raise


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
    """Raise `UsageError` when OUT is there and may not be replaced, or cannot be made.

    What `force` may replace is an empty folder or one that a run made: anything else is not ours to remove.
    """
    if out.exists() and not force:
        raise UsageError(f"{out} exists; choose another folder, or replace it with --force.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is not a folder; choose another name.")
    if out.exists() and any(out.iterdir()) and not is_result(out):
        raise UsageError(
            f"{out} was not made by moe-compress, so --force does not replace it; choose another folder, or remove it "
            "yourself."
        )
    if not out.parent.is_dir():
        raise UsageError(f"the folder {out.parent} does not exist; create it first.")


def is_result(folder: Path) -> bool:
    """Whether a run made this folder, as its manifest says."""
    content = _json(folder / MANIFEST_FILE)
    return isinstance(content, dict) and str(content.get("tool")).startswith(f"{TOOL} ")


def refuse_unwritable(folder: Path) -> None:
    """Raise `UsageError` when `folder`, or the nearest one above it that exists, cannot hold new files: it is tried."""
    present = _present(folder)
    if not present.is_dir():
        raise UsageError(f"{present} is not a folder; choose another place.")
    try:
        with TemporaryDirectory(prefix=f".{TOOL}-", dir=present):
            pass
    except OSError as error:
        raise UsageError(f"nothing can be written in {present} ({error.strerror}); choose another place.") from None


def _present(folder: Path) -> Path:
    """`folder`, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def require_space(folder: Path, needed: int) -> None:
    """Raise `CheckpointError` when fewer than `needed` bytes are free where `folder` lies."""
    free = shutil.disk_usage(_present(folder)).free
    if free < needed:
        raise CheckpointError(
            f"this run needs about {needed / 1e9:.2f} GB at {folder}, but only {free / 1e9:.2f} GB are free there; "
            "free some space, or choose another place with --work."
        )


@contextmanager
def explained_disk_errors(folder: Path, advice: str = "continue with --resume") -> Iterator[None]:
    """Turn a full disk into a sentence; `advice` says what to do once there is space."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        codes = (errno.ENOSPC, errno.EDQUOT)
        code = error.errno if isinstance(error, OSError) else None
        # safetensors has no other place for the code
        if code not in codes and not any(f"(os error {number})" in str(error) for number in codes):
            raise
        raise CheckpointError(f"the disk of {folder} is full; free some space and {advice}.") from None


def same_disk(one: Path, other: Path) -> bool:
    """Whether a rename can move a file from one folder to the other."""
    return _present(one).stat().st_dev == _present(other).stat().st_dev


def place(finished: Path, out: Path) -> None:
    """Make the finished folder appear as OUT by a rename; an older OUT is removed after that."""
    near, old = _incoming(out), _old(out)
    remove_leftovers(out)
    if not same_disk(finished, out.parent):
        try:
            with explained_disk_errors(out.parent):
                near.mkdir()
                for entry in sorted(finished.rglob("*")):
                    target = near / entry.relative_to(finished)
                    target.mkdir() if entry.is_dir() else shutil.copyfile(entry, target)
        except BaseException:
            shutil.rmtree(near, ignore_errors=True)
            raise
        finished = near
    for entry in finished.rglob("*"):
        sync(entry)
    if out.exists():
        out.rename(old)
    replace_durably(finished, out)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(out: Path) -> None:
    """Remove what a `place` that was cut short left beside OUT."""
    for folder in (_incoming(out), _old(out)):
        shutil.rmtree(folder, ignore_errors=True)


def _incoming(out: Path) -> Path:
    return out.with_name(f".{out.name}.incoming")


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")
