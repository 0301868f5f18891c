"""What every step needs besides its own settings."""

from __future__ import annotations

from dataclasses import dataclass

from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.data import Calibration
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.progress import Progress


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
