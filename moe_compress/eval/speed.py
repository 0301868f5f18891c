"""Measured speed and memory: prefill and decode in tokens per second, peak resident and GPU memory, side by side.

Every model runs in a fresh process of its own, in plain transformers, on the same random prompt. The processes take
turns (A B, B A, A B, ...), so that a busy machine slows all alike, and medians are reported: their ratio means more
than any one of them. Models that fit into memory together stay loaded; others are loaded anew for every turn, in a new
process.

Not covered: serving engines, several devices, batches that grow while they run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import AutoConfig

from moe_compress.errors import CheckpointError, MeasurementError, UsageError
from moe_compress.eval.memory import require_memory

PACKAGE_ROOT = Path(__file__).parents[2]
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")


@dataclass(frozen=True)
class Workload:
    """What one measurement runs: `batch_size` prompts of random tokens, then greedy decoding."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    seed: int = 0


def measure_speed(
    folders: Mapping[str, Path],
    device: str = "cpu",
    repeats: int = 5,
    *,
    batch_size: int = 1,
    prompt_tokens: int = 256,
    new_tokens: int = 16,
) -> dict[str, dict[str, Any]]:
    """Measure the checkpoints in `folders`, all in one run.

    Returns, under the same names, {"speed": {"prefill_tokens_per_s", "decode_tokens_per_s"}, "peak_rss_bytes",
    "speed_turns" {rate: {turn: value}}, "speed_settings"} and on CUDA "peak_gpu_bytes": medians of `repeats` turns,
    peaks the largest seen. The prompt is shortened, the same for all, where a model's context is too small. A model
    that does not fit into memory, or does not run, gives {"not_measured": {"speed": why}} instead. Raises `UsageError`
    for settings that measure nothing, `CheckpointError` when a folder holds no checkpoint.
    """
    if repeats < 1 or batch_size < 1 or prompt_tokens < 1 or new_tokens < 2:
        raise UsageError("A speed measurement needs a repeat, a sequence, a prompt token and two new tokens at least.")
    names = [*folders]
    prompt = min([prompt_tokens, *(_context(folder) - new_tokens for folder in folders.values())])
    if prompt < 1:
        reason = f"the context of the model is too small for {new_tokens} new tokens."
        return {name: _not_measured(reason) for name in folders}
    workload = Workload(batch_size, prompt, new_tokens)
    failed: dict[str, str] = {}
    for name, folder in folders.items():
        with _noted(name, failed):
            require_memory(folder, device)
    folders = {name: folder for name, folder in folders.items() if name not in failed}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    stay = _fit_together(folders.values(), device)
    with tempfile.TemporaryDirectory() as scratch:
        logs = (Path(scratch) / str(number) for number in range(len(folders)))
        workers = {name: _Worker(folders[name], device, workload, log) for name, log in zip(folders, logs, strict=True)}
        try:
            if stay:
                for worker in workers.values():
                    worker.start()
            for turn in range(repeats):
                for name in list(folders)[:: 1 if turn % 2 == 0 else -1]:
                    if name not in failed:
                        with _noted(name, failed):
                            turns[name].append(workers[name].measure())
                    if not stay:
                        workers[name].stop()
        finally:
            for worker in workers.values():
                worker.stop()
    settings = asdict(workload) | {"repeats": repeats, "device": device}
    return {
        name: _not_measured(failed[name])
        if name in failed
        else _summary(turns[name]) | {"speed_settings": settings | workers[name].description}
        for name in names
    }


@contextmanager
def _noted(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Keep why a model cannot be measured, so that the others still are."""
    try:
        yield
    except MeasurementError as error:
        failed[name] = str(error)


def _not_measured(reason: str) -> dict[str, Any]:
    return {"not_measured": {"speed": reason}}


def _summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    peaks = {key: max(turn[key] for turn in turns) for key in turns[0] if key not in RATES}
    rates = {key: {str(number): turn[key] for number, turn in enumerate(turns, start=1)} for key in RATES}
    return {"speed": {key: median(by.values()) for key, by in rates.items()}, "speed_turns": rates} | peaks


class _Worker:
    """The process that holds one model; it starts when first needed."""

    def __init__(self, folder: Path, device: str, workload: Workload, log: Path) -> None:
        self.description: dict[str, Any] = {}
        self._settings = json.dumps(asdict(workload) | {"folder": str(folder.resolve()), "device": device})
        self._process: subprocess.Popen[str] | None = None
        self._log = log

    def start(self) -> None:
        """Begin loading; does not wait."""
        paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moe_compress.eval._speed_worker", self._settings],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        self.description = {}

    def measure(self) -> dict[str, Any]:
        """One turn, after loading if that is still to be done."""
        if self._process is None:
            self.start()
        if not self.description:
            self.description = self._read()
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _read(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = [line.strip() for line in self._log.read_text(encoding="utf-8").splitlines() if line.strip()]
            reason = said[-1] if said else "its process was killed"
            raise MeasurementError(f"its process ended: {reason}" if said else f"{reason}.")
        content: dict[str, Any] = json.loads(line)
        return content


def _context(folder: Path) -> int:
    """Longest sequence of the model in `folder`, in tokens."""
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no model that transformers can load.") from error
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def _fit_together(folders: Iterable[Path], device: str) -> bool:
    """Whether all the models fit into memory at once, with room for float32 copies and for other processes."""
    stored = sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
    if torch.device(device).type == "cuda":
        return 2 * stored < int(torch.cuda.mem_get_info(device)[0])
    return 4 * stored < int(psutil.virtual_memory().available)
