"""Writing what was trained into a checkpoint: these tensors, in the types they are stored in, and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from moe_compress.checkpoint.stream import TORCH_DTYPES, LayerStream
from moe_compress.compress.metered import MeteredChange
from moe_compress.models.layers import MoELayer

Readers = Mapping[str, Callable[[], Tensor]]  # the model's name of a trained tensor -> its value


class DistillChange(MeteredChange):
    """Puts trained tensors in the place of the old ones; `trained` names them as the model does, every alias too."""

    def __init__(self, stream: LayerStream, trained: Readers) -> None:
        self.stream, self.trained = stream, trained
        prefix = f"{stream.layers_name}."
        self._inside: dict[int, dict[str, str]] = defaultdict(dict)  # layer -> name inside it -> name in the model
        for name in trained:
            if name.startswith(prefix):
                index, _, inside = name[len(prefix) :].partition(".")
                self._inside[int(index)][inside] = name

    def layer(self, moe: MoELayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.plain_layer(moe.layer, state)

    def plain_layer(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {
            inside: rounded(self.trained[name](), self.stream, name, state[inside])
            for inside, name in self._inside[index].items()
        }
        return {**state, **new}

    def packs(self, index: int) -> Collection[str]:
        return list(self._inside[index])

    def outside(self) -> dict[str, Tensor]:
        prefix = f"{self.stream.layers_name}."
        return {name: read() for name, read in self.trained.items() if not name.startswith(prefix)}


def rounded(value: Tensor, stream: LayerStream, name: str, like: Tensor) -> Tensor:
    """A trained tensor as it comes back from the checkpoint, in the type and on the device of `like`."""
    stored = stream.stored_dtypes.get(name)
    dtype: torch.dtype = like.dtype if stored is None else TORCH_DTYPES[stored]
    return value.to(dtype).to(like.device, like.dtype)
