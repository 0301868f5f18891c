"""Whether a whole model fits into memory, judged from its headers before anything is loaded.

Not covered: what running it needs besides its weights, which is small for one sequence.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from transformers import AutoConfig

from moe_compress.checkpoint.index import TensorIndex
from moe_compress.errors import CheckpointError, MeasurementError
from moe_compress.eval.precision import compute_dtype

FLOATING = ("F64", "F32", "F16", "BF16")


def require_memory(folder: Path, device: str) -> None:
    """Raise `MeasurementError` when the checkpoint in `folder`, loaded whole, does not fit into the free memory."""
    needed, free = resident_bytes(folder, device), free_bytes(device)
    if needed > free:
        raise MeasurementError(
            f"the whole model takes {needed / 1e9:.2f} GB of memory and {free / 1e9:.2f} GB are free; measure it on a "
            "larger machine with `moe-compress eval`."
        )


def resident_bytes(folder: Path, device: str) -> int:
    """Bytes of the weights in the number format they are computed in on `device`."""
    try:
        size = compute_dtype(AutoConfig.from_pretrained(folder), device).itemsize
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no model that transformers can load.") from error
    index = TensorIndex.from_folder(folder)
    return sum(info.numel * size if info.dtype in FLOATING else info.nbytes for info in index.values())


def free_bytes(device: str) -> int:
    """Free memory of the machine, or of the accelerator."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
