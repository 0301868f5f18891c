"""How much the loss feels each channel of every MoE block's routed output: a forward sweep, then one back through it.

Gradients are taken by relative changes: by the output over the norm of the hidden states that leave the layer.

The forward sweep keeps what enters each layer, on disk; the sweep back loads the layers last to first, runs each again
with gradients, and hands the gradient of its input on to the layer before. One layer is resident at a time.

Not covered: layers that hand on more than their hidden states (the gradient does not follow that way).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_compress.checkpoint.durable import replace_durably
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.models.layers import MoELayer
from moe_compress.models.lockstep import Lockstep
from moe_compress.progress import Stage

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a layer besides its hidden states


def channel_gradients(
    stream: LayerStream, tokens: Tensor, *, batch_size: int, folder: Path, stage: Stage
) -> dict[int, Tensor]:
    """Mean over tokens of the squared gradient of the loss by the token's routed output, times |h|^2, per channel.

    h are the hidden states that leave the layer. Returns float64 [H] by MoE layer, kept in `folder` and read from there
    when it is complete. The loss is the sum of the next tokens' negative log-likelihoods in `tokens` [N, S]; the routed
    output is what the block adds, scaling factors included. `stage` advances twice per layer.
    """
    file = folder / "relative-gradients.safetensors"
    if file.exists():
        return {int(layer): values for layer, values in load_file(file).items()}
    folder.mkdir(parents=True, exist_ok=True)
    calls, gradients = _forward(stream, tokens.to(stream.device).split(batch_size), folder, stage)
    moments: dict[int, Tensor] = {}
    for index in reversed(range(len(stream.layers))):
        layer = stream.load(index).requires_grad_(False)
        squares = _Squares(stream.moe_layers[index]) if index in stream.moe_layers else None
        entering = load_file(_kept(folder, index))
        for batch, (args, kwargs) in enumerate(calls[index]):
            hidden = entering[str(batch)].to(stream.device).requires_grad_()
            output = layer(hidden, *args, **kwargs)
            leaving = output if isinstance(output, Tensor) else output[0]
            if squares is not None:
                squares.leaving_T = leaving.detach().double().flatten(2).norm(dim=-1).flatten()
            leaving.backward(gradients[batch])
            assert hidden.grad is not None
            gradients[batch] = hidden.grad
        if squares is not None:
            moments[index] = squares.close() / tokens.numel()
        _kept(folder, index).unlink()
        stream.release(index)
        stage.advance("back")
    temporary = folder / "gradients.part"
    save_file({str(layer): values for layer, values in moments.items()}, temporary)
    replace_durably(temporary, file)
    return moments


def _forward(
    stream: LayerStream, batches: Sequence[Tensor], folder: Path, stage: Stage
) -> tuple[list[list[Call]], list[Tensor]]:
    """What every layer was called with besides hidden states, and the loss's gradients by those that left the last."""
    calls: list[list[Call]] = [[] for _ in stream.layers]
    hidden: dict[str, Tensor] = {}

    def record(batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = dict(kwargs)
        entering = args[0] if args else others.pop("hidden_states")
        hidden[str(batch)] = entering.detach().cpu().contiguous()
        calls[index].append((args[1:], others))

    def loss(batch: int, logits_BSV: Tensor) -> Tensor:
        predicted = logits_BSV[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(predicted, batches[batch][:, 1:].flatten(), reduction="sum")

    stream.load_trunk()
    run = Lockstep(stream.model, stream.layers, batches)
    run.recorder = record
    last = len(stream.layers) - 1
    try:
        for index in range(len(stream.layers)):
            stream.load(index).requires_grad_(False)
            if index == last:
                stream.load_head()
                stream.model.requires_grad_(False)
                gradients = run.last_gradients(index, loss)
            else:
                run.through(index)
            stream.release(index)
            save_file(hidden, _kept(folder, index))
            stage.advance("forward")
    finally:
        run.close()
    return calls, gradients


class _Squares:
    """Adds up the squared gradients of one MoE layer's routed output."""

    def __init__(self, moe: MoELayer) -> None:
        self.scale = moe.output_scale
        self.sum_H = torch.zeros(moe.width, dtype=torch.float64)
        self.leaving_T = torch.ones(1, dtype=torch.float64)  # norms of the hidden states that left the layer
        self._hook = moe.experts.register_forward_hook(self._watch)

    def close(self) -> Tensor:
        """Stop watching; the sum [H]."""
        self._hook.remove()
        return self.sum_H

    def _watch(self, module: Any, inputs: Any, routed_TH: Tensor) -> None:
        if routed_TH.requires_grad:
            routed_TH.register_hook(self._add)

    def _add(self, gradient_TH: Tensor) -> None:
        relative_TH = gradient_TH.double() / self.scale * self.leaving_T[:, None]
        self.sum_H += relative_TH.square().sum(0).cpu()


def _kept(folder: Path, index: int) -> Path:
    """What enters layer `index`, on disk."""
    return folder / f"entering-{index:05d}.safetensors"
