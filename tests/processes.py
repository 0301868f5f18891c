"""Several processes that work together, as forks of this one: their libraries are imported already."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState

FORKS = get_context("fork")


def in_processes(count: int, action: Callable[[], Any]) -> None:
    """Run `action` in `count` processes that torch.distributed and accelerate take for one training.

    Raises `ChildProcessError` when one of them fails, and ends the others, which would wait for it; what it said is on
    standard error.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = [FORKS.Process(target=_work, args=(action, rank, count, port)) for rank in range(count)]
    for child in children:
        child.start()
    working = children
    while working and not any(child.exitcode for child in children):
        wait([child.sentinel for child in working])
        working = [child for child in working if child.exitcode is None]
    failed = [child for child in children if child.exitcode]
    for child in working:
        child.kill()
    for child in children:
        child.join()
    if failed:
        raise ChildProcessError(f"{len(failed)} of {count} processes failed")


def _work(action: Callable[[], Any], rank: int, count: int, port: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)
    action()
    dist.destroy_process_group()
