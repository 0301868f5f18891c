"""What the loss feels of each channel, layer by layer, against one backward pass through the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_compress.calibrate.gradients import channel_gradients
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.progress import SilentProgress
from tests.tiny_checkpoint import VOCABULARY, tiny_checkpoint

TOKENS = torch.randint(VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
LAYERS = 2


def test_gradients_are_by_changes_relative_to_the_stream(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "qwen3_moe", dtype=torch.float32, num_hidden_layers=LAYERS)
    with SilentProgress().stage("gradients", 2 * LAYERS) as stage:
        found = channel_gradients(
            LayerStream(open_checkpoint(str(folder))), TOKENS, batch_size=2, folder=tmp_path / "work", stage=stage
        )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    routed: list[Tensor] = []
    leaving: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        routed.append(output)

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(keep)
        layer.register_forward_hook(lambda module, inputs, output: leaving.append(output.detach().flatten(0, 1)))
    logits = model(input_ids=TOKENS, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum").backward()
    for layer in range(LAYERS):
        assert routed[layer].grad is not None
        expected = [g.square() * h.square().sum() for g, h in zip(routed[layer].grad, leaving[layer], strict=True)]
        torch.testing.assert_close(found[layer], torch.stack(expected).mean(0), rtol=1e-3, atol=0.0)
