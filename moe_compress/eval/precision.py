"""The number format to compute in: the checkpoint's own where the device is fast at it, float32 elsewhere.

On processors without bfloat16 units such products are about five times slower than in float32. What is stored on disk
is never changed by this.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch
from transformers import PretrainedConfig

CPU_INFO = Path("/proc/cpuinfo")


@cache
def cpu_has_bf16_units() -> bool:
    """Whether the processor multiplies bfloat16 natively; False where the system does not tell."""
    if not CPU_INFO.exists():
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE)
    return flags is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[1].split())


def compute_dtype(config: PretrainedConfig, device: str) -> torch.dtype:
    """The number format to load a checkpoint in."""
    stored = config.get_text_config().dtype
    if not isinstance(stored, torch.dtype):
        return torch.float32
    if torch.device(device).type == "cpu" and not (stored == torch.bfloat16 and cpu_has_bf16_units()):
        return torch.float32
    return stored
