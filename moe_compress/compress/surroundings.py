"""What every step needs besides its own settings."""

from __future__ import annotations

from dataclasses import dataclass

from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.data import Calibration
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.errors import UsageError
from moe_compress.progress import Progress


def resolved(device: str) -> str:
    """The device that is meant: `auto` is CUDA where there is one. Raises `UsageError` when there is none."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here; use --device cpu.")
    return device


@dataclass(frozen=True)
class Surroundings:
    """Where and how the work is done."""

    calibration: CalibrationConfig
    max_shard_bytes: int
    device: str
    progress: Progress
    tier: str = "stock"
    data: Calibration | None = None  # when it was read before
    original: Checkpoint | None = None  # that the recipe began with
