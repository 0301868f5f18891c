"""The state of a training where something goes wrong with its files."""

from __future__ import annotations

import errno
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from moe_compress.compress.distill import state
from moe_compress.compress.distill.state import load_state, parameter_readers, save_state, state_update


def made() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    parameter = torch.nn.Parameter(torch.randn(64, 64))
    return {"weight": parameter}, torch.optim.AdamW([parameter])


def test_a_disk_that_takes_no_more_is_an_error_of_the_disk(tmp_path: Path) -> None:
    """Not one of torch's, which would pass by everything that explains errors; the state before stays."""
    parameters, optimizer = made()
    save_state(tmp_path, 1, parameters, optimizer, "x")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError) as failed:
            save_state(tmp_path, 2, parameters, optimizer, "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.value.errno == errno.EFBIG
    assert state_update(tmp_path) == 1
    assert torch.equal(parameter_readers(tmp_path)["weight"](), parameters["weight"])
    save_state(tmp_path, 2, parameters, optimizer, "x")
    assert state_update(tmp_path) == 2


def test_a_damaged_state_ends_as_its_file_does(tmp_path: Path) -> None:
    parameters, optimizer = made()
    save_state(tmp_path, 1, parameters, optimizer, "x")
    for file in tmp_path.glob("state-*/*.distcp"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(EOFError):
        load_state(tmp_path, parameters, optimizer, "x")


def test_a_full_disk_in_another_process_is_that_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from there has lost the error of the disk."""
    parameters, optimizer = made()

    def failing(*_: object, **__: object) -> None:
        raise CheckpointException("save", {1: _wrap_exception(RuntimeError("unexpected pos 64 vs 0"))})

    monkeypatch.setattr(state, "save", failing)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        save_state(tmp_path, 1, parameters, optimizer, "x")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, 1, parameters, optimizer, "x")
