"""What is said of training processes, and shown of what they do; none is started here."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.distill import worker
from moe_compress.compress.distill.config import DistillConfig
from moe_compress.compress.distill.state import METRICS_FILE
from moe_compress.compress.distill.train import Job
from moe_compress.errors import TrainingError
from tests.crashes import in_child

# The end of what torch.distributed.run says of a process that the system killed
KILLED = """
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  exitcode  : -9 (pid: 26530)
  traceback : Signal 9 (SIGKILL) received by PID 26530
============================================================
"""


class Ended:
    """Processes that have ended with this code."""

    def __init__(self, returncode: int, log: str = "") -> None:
        self.returncode, self.log = returncode, log

    def __call__(self, command: list[str], stdout: Any, **_: Any) -> Ended:
        stdout.write(self.log.encode())
        return self

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def job(tmp_path: Path) -> Job:
    config = DistillConfig.model_validate({"op": "distill", "processes": 2})
    return Job(config, tmp_path, tmp_path, tmp_path, "cpu", "x")


def failing(job: Job, rank: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process of this rank end by an error."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(worker, "train", fail)
    monkeypatch.setenv("RANK", str(rank))
    write_json(job.folder / worker.JOB_FILE, job.to_json() | {"parent": os.getpid()})
    worker.main(job.folder / worker.JOB_FILE)


def test_the_first_process_that_fails_is_quoted(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError):
        failing(job, 1, RuntimeError("CUDA out of memory.\nTried to allocate"), monkeypatch)
    os.utime(next(job.folder.glob(worker.FAILURES)), (1, 1))  # clocks of file systems are coarse
    failing(job, 0, TrainingError("another process is gone."), monkeypatch)
    assert worker._reason(job.folder) == "RuntimeError: CUDA out of memory"


def test_a_killed_process_is_said(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", Ended(1, KILLED))
    with pytest.raises(TrainingError, match=r"failed: traceback : Signal 9 \(SIGKILL\) received by PID 26530 \(see"):
        worker.train_in_processes(job, 0, lambda line: None)


def test_updates_that_will_be_made_again_are_not_shown(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed training's lines reach beyond its last state."""
    (job.folder / METRICS_FILE).write_text("".join(json.dumps({"update": update}) + "\n" for update in range(5)))
    monkeypatch.setattr(subprocess, "Popen", Ended(0))
    shown: list[int] = []
    worker.train_in_processes(job, 3, lambda line: shown.append(line["update"]))
    assert shown == []


def test_a_process_ends_with_the_one_that_started_it(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an update: it would write beside whoever goes on."""
    parent = subprocess.Popen(["true"])
    parent.wait()
    monkeypatch.setattr(worker, "train", lambda *_: time.sleep(60))
    monkeypatch.setenv("RANK", "0")
    write_json(job.folder / worker.JOB_FILE, job.to_json() | {"parent": parent.pid})
    started = time.monotonic()
    assert in_child(lambda: worker.main(job.folder / worker.JOB_FILE)) == 1
    assert time.monotonic() - started < 30
