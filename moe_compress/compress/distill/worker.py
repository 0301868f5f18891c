"""Whole-model distillation in several processes: how they are started and watched, and what each of them runs.

python -m torch.distributed.run --nproc_per_node N -m moe_compress.compress.distill.worker JOB.json
python -m accelerate.commands.launch --config_file FILE --module moe_compress.compress.distill.worker JOB.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from accelerate.utils import disable_fsdp_ram_efficient_loading

from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.distill.state import read_metrics
from moe_compress.compress.distill.train import Job, train
from moe_compress.errors import MoECompressError, TrainingError

POLL_SECONDS = 0.5
JOB_FILE, FAILURE_FILE, LOG_FILE = "job.json", "failure.json", "processes.log"


def train_in_processes(job: Job, first: int, on_update: Callable[[dict[str, Any]], None]) -> None:
    """`train` in `config.processes` processes; they end when this one does. `first` is the update they begin with.

    With an accelerate config, they are started by accelerate as it says.

    Raises `TrainingError` with what went wrong in them.
    """
    failure = job.folder / FAILURE_FILE
    failure.unlink(missing_ok=True)
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
            while (ended := started.poll() is not None) or True:
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
        said = (job.folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = said[-1] if said else "no message"
        if failure.exists():
            reason = json.loads(failure.read_text(encoding="utf-8"))["sentence"]
        raise TrainingError(f"the training processes failed: {reason} (see {job.folder / LOG_FILE})")


def main(file: Path) -> int:
    """One of the processes; the exit code."""
    content = json.loads(file.read_text(encoding="utf-8"))
    parent = content.pop("parent")
    disable_fsdp_ram_efficient_loading()  # which would let transformers read a model in one process alone

    def watch(line: dict[str, Any]) -> None:
        if not psutil.pid_exists(parent):
            os._exit(1)  # whoever goes on later must find nobody else at work

    try:
        train(Job.from_json(content), watch)
    except MoECompressError as error:
        write_json(file.with_name(FAILURE_FILE), {"sentence": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
