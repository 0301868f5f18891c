"""What the matrix tests share: one family's tiny checkpoint, what is made of it, and how the result is judged."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_compress.checkpoint.rewrite import Change, Ledger, rewrite
from moe_compress.checkpoint.source import Checkpoint, open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.progress import SilentProgress
from tests.matrix.families import NUM_LAYERS, model_class, save, tiny_config, tiny_model


class FamilyCase:
    """One family's checkpoint in `folder/source`; what is made of it lies beside it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        save(tiny_model(tiny_config(name)), folder / "source")

    @cached_property
    def source(self) -> Checkpoint:
        return open_checkpoint(str(self.folder / "source"))

    @cached_property
    def stream(self) -> LayerStream:
        return LayerStream(self.source)

    def rewrite(self, name: str, change: Change, stage: Any = None) -> Ledger:
        with SilentProgress().stage(name, NUM_LAYERS) as silent:
            stage = stage or silent
            return rewrite(self.source, self.folder / name, change, max_shard_bytes=60_000, device="cpu", stage=stage)

    def written(self, name: str, change: Change) -> Path:
        """The folder that `rewrite` made."""
        self.rewrite(name, change)
        return self.folder / name

    def load(self, name: str, **settings: Any) -> PreTrainedModel:
        """What `AutoModelForCausalLM` makes of a folder; every weight must be found."""
        model, info = AutoModelForCausalLM.from_pretrained(
            self.folder / name, dtype=torch.float32, output_loading_info=True, **settings
        )
        assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
        return model.eval()  # type: ignore[no-any-return]

    def probe_error(self, model: PreTrainedModel, name: str) -> float:
        """Largest difference between a model's logits and those the apply sweep gave, relative to their spread."""
        return probe_error(model, self.folder / name)


def load_eager(name: str, folder: Path) -> PreTrainedModel:
    """A family's folder in plain transformers, with the experts' own eager code; every weight must be found."""
    model, info = model_class(tiny_config(name)).from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    return model.eval()  # type: ignore[no-any-return]


def probe_error(model: PreTrainedModel, folder: Path) -> float:
    """Largest difference between a model's logits and the probe's in `folder`, relative to their spread."""
    with np.load(folder / "probe.npz") as probe, torch.no_grad():
        logits = model(input_ids=torch.from_numpy(probe["tokens"]), use_cache=False).logits
        return relative(logits[0, probe["positions"]].numpy(), probe["logits"])


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the spread of what is expected."""
    return float(np.abs(found - expected).max() / expected.std())
