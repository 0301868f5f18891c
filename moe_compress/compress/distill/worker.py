"""Whole-model distillation in several processes: how they are started and watched, and what each of them runs.

python -m torch.distributed.run --nproc_per_node N -m moe_compress.compress.distill.worker JOB.json
python -m accelerate.commands.launch --config_file FILE --module moe_compress.compress.distill.worker JOB.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from accelerate.utils import disable_fsdp_ram_efficient_loading

from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.distill.state import Metrics, read_metrics
from moe_compress.compress.distill.train import Job, train
from moe_compress.errors import MoECompressError, TrainingError
from moe_compress.text import first_line

POLL_SECONDS = 0.5
JOB_FILE, LOG_FILE = "job.json", "processes.log"
FAILURES = "failure-*.json"  # one for each process


def train_in_processes(job: Job, first: int, on_update: Callable[[dict[str, Any]], None]) -> None:
    """`train` in `config.processes` processes; they end when this one does. `first` is the update they begin with.

    With an accelerate config, they are started by accelerate as it says.

    Raises `TrainingError` with what went wrong in them.
    """
    for failure in job.folder.glob(FAILURES):
        failure.unlink()
    Metrics(job.folder, first)  # what an interrupted training wrote after its last state is not shown again
    write_json(job.folder / JOB_FILE, job.to_json() | {"parent": os.getpid()})
    if job.launch is not None:
        assert job.config.accelerate_config is not None
        command = ["accelerate.commands.launch", "--config_file", job.config.accelerate_config]
        command += ["--main_process_port", "0", "--module"]  # any that is free
    else:
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(job.config.processes), "-m"]
    command = [sys.executable, "-m", *command, __name__, str(job.folder / JOB_FILE)]
    shown = first
    with (job.folder / LOG_FILE).open("wb") as log:
        started = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                ended = started.poll() is not None
                for line in read_metrics(job.folder):
                    if line["update"] >= shown:
                        on_update(line)
                        shown = line["update"] + 1
                if ended:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            if started.poll() is None:
                started.terminate()
                started.wait()
    if started.returncode:
        raise TrainingError(f"the training processes failed: {_reason(job.folder)} (see {job.folder / LOG_FILE})")


def _reason(folder: Path) -> str:
    """What the process that failed first says of it; the log's last words where none could, as one that was killed."""
    failures = sorted(folder.glob(FAILURES), key=lambda file: file.stat().st_mtime_ns)
    if failures:
        return str(json.loads(failures[0].read_text(encoding="utf-8"))["sentence"])
    lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip("=- ")), "no message")


def main(file: Path) -> int:
    """One of the processes; the exit code."""
    content = json.loads(file.read_text(encoding="utf-8"))
    parent = content.pop("parent")
    _end_with(parent)
    disable_fsdp_ram_efficient_loading()  # which would let transformers read a model in one process alone
    failure = file.with_name(FAILURES.replace("*", os.environ["RANK"]))
    try:
        train(Job.from_json(content), lambda line: None)
    except MoECompressError as error:
        write_json(failure, {"sentence": str(error)})
        return 1
    except Exception as error:
        write_json(failure, {"sentence": f"{type(error).__name__}: {first_line(error)}"})
        raise
    return 0


def _end_with(parent: int) -> None:
    """End this process when `parent` has, in the middle of an update too: who goes on must find nobody at work."""

    def watch() -> None:
        while psutil.pid_exists(parent):
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
