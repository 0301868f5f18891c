"""The state of a training on disk, and its metrics: whole files, from which it goes on as if it had not stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compress.checkpoint.durable import replace_durably
from moe_compress.errors import ResumeError

STATE_FILE = "state.pt"
METRICS_FILE = "metrics.jsonl"


def save_state(
    folder: Path, update: int, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, identity: str
) -> None:
    """Keep what the trained parameters and the optimizer are before update number `update`."""
    state = {
        "update": update,
        "identity": identity,
        "parameters": {name: value.detach().cpu() for name, value in parameters.items()},
        "optimizer": optimizer.state_dict(),
    }
    temporary = folder / f"{STATE_FILE}.part"
    torch.save(state, temporary)
    replace_durably(temporary, folder / STATE_FILE)


def load_state(folder: Path, parameters: dict[str, Any], optimizer: torch.optim.Optimizer, identity: str) -> int:
    """Take up what `save_state` kept; returns the update to go on with, 0 where there is nothing.

    Raises `ResumeError` when it is of another training.
    """
    file = folder / STATE_FILE
    if not file.exists():
        return 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    if state["identity"] != identity:
        raise ResumeError(f"{file} is of a training with other data or settings; start over with --force.")
    with torch.no_grad():
        for name, value in state["parameters"].items():
            parameters[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["update"])


def state_update(folder: Path) -> int:
    """The update that the state in `folder` goes on with; 0 without one."""
    file = folder / STATE_FILE
    return int(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["update"]) if file.exists() else 0


def load_parameters(folder: Path) -> dict[str, Tensor]:
    """The trained parameters, by their first names."""
    found: dict[str, Tensor] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)["parameters"]
    return found


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
