"""Several processes that work together, as forks of this one: their libraries are imported already."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState


def in_processes(count: int, action: Callable[[], Any]) -> None:
    """Run `action` in `count` processes that torch.distributed and accelerate take for one training.

    Raises `ChildProcessError` when one of them fails; what it said is on standard error.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(count):
        pid = os.fork()
        if not pid:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {key: str(value) for key, value in place.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            AcceleratorState._reset_state(reset_partial_state=True)
            try:
                action()
                dist.destroy_process_group()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(pid)
    failed = [pid for pid in children if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
    if failed:
        raise ChildProcessError(f"{len(failed)} of {count} processes failed")
