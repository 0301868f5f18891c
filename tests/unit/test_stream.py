"""A layer that cannot be made of what a checkpoint holds is refused in a sentence that names the parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.errors import CheckpointError
from tests.tiny_checkpoint import tiny_checkpoint

EXPERT = "model.layers.1.mlp.experts.3"


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        (f"{EXPERT}.gate_proj.weight", "experts.gate_up_proj` cannot be made: a tensor of it is missing or damaged"),
        (f"{EXPERT}.down_proj.weight", "experts.down_proj` has the shape (7, 32, 16), the configuration says (8, "),
        ("model.layers.1.input_layernorm.weight", "holds no weights for `model.layers.1.input_layernorm.weight`."),
    ],
)
def test_a_layer_that_lacks_a_tensor(missing: str, sentence: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    del tensors[missing]
    save_file(tensors, folder / "model.safetensors")
    stream = LayerStream(open_checkpoint(str(folder)))
    stream.load(0)
    with pytest.raises(CheckpointError) as caught:
        stream.load(1)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
