"""Hidden states between two layers, kept on disk so that a sweep over the layers can go on after a crash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_compress.checkpoint.durable import replace_durably


def save_hidden(folder: Path, layer: int, hidden: Sequence[Tensor]) -> None:
    """Keep the hidden states of all batches that enter `layer`; those that entered the layer before are forgotten."""
    write_hidden(folder, layer, hidden)()


def write_hidden(folder: Path, layer: int, hidden: Sequence[Tensor]) -> Callable[[], None]:
    """Write them under a temporary name; what is returned does the rest of `save_hidden`."""
    temporary = folder / "hidden.part"
    save_file({str(batch): values.cpu().contiguous() for batch, values in enumerate(hidden)}, temporary)

    def commit() -> None:
        replace_durably(temporary, _file(folder, layer))
        _file(folder, layer - 1).unlink(missing_ok=True)

    return commit


def load_hidden(folder: Path) -> tuple[int, list[Tensor]]:
    """The layer an interrupted sweep has to go on with, and what enters it; `(0, [])` when nothing readable is."""
    for kept in sorted(folder.glob("hidden-*.safetensors"), reverse=True):
        try:
            stored = load_file(kept)
            return int(kept.stem.split("-")[1]), [stored[str(batch)] for batch in range(len(stored))]
        except (SafetensorError, OSError, KeyError, ValueError):
            continue  # a power cut or a failing disk left it so; what it held is computed again
    return 0, []


def forget_hidden(folder: Path) -> None:
    """Remove what `save_hidden` kept."""
    for file in folder.glob("hidden-*.safetensors"):
        file.unlink()


def _file(folder: Path, layer: int) -> Path:
    return folder / f"hidden-{layer:05d}.safetensors"
