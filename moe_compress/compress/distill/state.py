"""The state of a training on disk, and its metrics: whole at any moment, so that it goes on as if it had not stopped.

A state is a folder, `state-<update>`, written by torch.distributed.checkpoint: every process writes what it holds of a
tensor, in parallel and without gathering it, and any number of processes can read it again.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moe_compress.checkpoint.durable import replace_durably
from moe_compress.checkpoint.writer import write_json
from moe_compress.errors import ResumeError

STATE, PART = "state-", "state.part"
ABOUT = "about.json"
METRICS_FILE = "metrics.jsonl"
FULL = 1 << 20  # a disk with fewer free bytes is full
PARAMETER, MOMENTS = "parameter", ("exp_avg", "exp_avg_sq")


def save_state(
    folder: Path, update: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, identity: str
) -> None:
    """Keep what the trained parameters and AdamW are before update number `update`; all processes call it together.

    What is kept of that update already stays: a training that fails there saves once more.
    """
    part, whole = folder / PART, folder / f"{STATE}{update:08d}"
    if whole.exists():
        return
    if _is_first():
        shutil.rmtree(part, ignore_errors=True)
    state: dict[str, Any] = {}
    for name, value in parameters.items():
        state |= _named(name, value, _moments(optimizer, value))
    if dist.is_initialized():
        dist.barrier()
    with _plainly(folder):
        save(state, storage_writer=FileSystemWriter(part))
    if _is_first():
        write_json(part / ABOUT, {"update": update, "identity": identity})
        older = _states(folder)
        replace_durably(part, whole)
        for state_folder in older:
            shutil.rmtree(state_folder)


def load_state(folder: Path, parameters: Mapping[str, Any], optimizer: torch.optim.Optimizer, identity: str) -> int:
    """Take up what `save_state` kept; returns the update to go on with, 0 where there is nothing.

    Raises `ResumeError` when it is of another training.
    """
    states = _states(folder)
    if not states:
        return 0
    about = json.loads((states[-1] / ABOUT).read_text(encoding="utf-8"))
    if about["identity"] != identity:
        raise ResumeError(f"{states[-1]} is of a training with other data or settings; start over with --force.")
    update: int = about["update"]
    state: dict[str, Any] = {}
    for name, value in parameters.items():
        moments = _moments(optimizer, value)
        optimizer.state[value] = {"step": torch.tensor(float(update)), **moments}
        state |= _named(name, value, moments)
    with _plainly(folder):
        load(state, storage_reader=FileSystemReader(states[-1]))
    return update


def state_update(folder: Path) -> int:
    """The update that the state in `folder` goes on with; 0 without one."""
    states = _states(folder)
    return int(json.loads((states[-1] / ABOUT).read_text(encoding="utf-8"))["update"]) if states else 0


def parameter_readers(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """What reads each trained parameter, by its first name."""
    state = _states(folder)[-1]
    stored = FileSystemReader(state).read_metadata().state_dict_metadata
    prefix = f"{PARAMETER}."
    return {key.removeprefix(prefix): partial(_read, state, key) for key in stored if key.startswith(prefix)}


def _read(state: Path, key: str) -> Tensor:
    reader = FileSystemReader(state)
    about: Any = reader.read_metadata().state_dict_metadata[key]
    found = {key: torch.empty(about.size, dtype=about.properties.dtype)}
    with _plainly(state):
        load(found, storage_reader=reader)
    return found[key]


def _named(name: str, parameter: Tensor, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is kept of a parameter, by its name in the state."""
    return {f"{PARAMETER}.{name}": parameter.detach()} | {f"{key}.{name}": value for key, value in moments.items()}


def _moments(optimizer: torch.optim.Optimizer, parameter: Any) -> dict[str, Tensor]:
    """AdamW's moments of a parameter; zeros before the first update."""
    known = optimizer.state.get(parameter, {})
    return {moment: known[moment] if moment in known else torch.zeros_like(parameter) for moment in MOMENTS}


def _states(folder: Path) -> list[Path]:
    """The whole states, in order; a run killed while it replaced one leaves two."""
    return sorted(folder.glob(f"{STATE}*"))


@contextmanager
def _plainly(folder: Path) -> Iterator[None]:
    """Without the warning that one process is alone, and with errors as they were.

    torch raises a kind that is no `Exception`, around an error that may itself have followed one of the disk. Between
    processes that other one is lost, so the disk of `folder` is asked.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as failed:
        if shutil.disk_usage(folder).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        causes: list[BaseException] = [next(iter(failed.failures.values()))[0]]
        while causes[-1].__context__ is not None:
            causes.append(causes[-1].__context__)
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from None


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


class Metrics:
    """`metrics.jsonl`: one line per update; what an interrupted run wrote after its last state is forgotten."""

    def __init__(self, folder: Path, update: int) -> None:
        self.file = folder / METRICS_FILE
        kept = [line for line in read_metrics(folder) if line["update"] < update]
        temporary = self.file.with_suffix(".part")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        replace_durably(temporary, self.file)

    def add(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())  # not lost while the state of a later update is kept


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines; the last may have been cut short."""
    file = folder / METRICS_FILE
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
