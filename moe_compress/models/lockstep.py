"""All batches through the model together, one decoder layer at a time.

A model's own `forward` knows its embeddings, masks and positions; only the order of the work has to change, so that
each layer is needed once for all batches instead of once per batch. Every batch's forward pass runs as a coroutine that
stops before each decoder layer and goes on when told to.

    run = Lockstep(model, layers, batches)
    for index in range(len(layers)):
        ...                       # make the layer's weights resident
        run.through(index)        # every batch passes the layer
    logits = run.finish()

Not covered: caches and training; hidden states of all batches stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from greenlet import greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel


class LayerObserver(Protocol):
    """Sees what goes into and comes out of a decoder layer, batch by batch."""

    def layer(self, input_BSH: Tensor, output_BSH: Tensor) -> None: ...


class Lockstep:
    """The forward passes of `batches` (token ids [B, S] each), held before the same decoder layer.

    `start` and `hidden` continue an earlier run: layers before `start` are skipped, and `hidden` holds, per batch, what
    came out of layer `start - 1`. Nothing is differentiated.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: nn.ModuleList,
        batches: Sequence[Tensor],
        *,
        start: int = 0,
        hidden: Sequence[Tensor] = (),
    ) -> None:
        self.model, self.layers = model, layers
        self.hidden: list[Tensor] = list(hidden) or [torch.empty(0)] * len(batches)
        self.logits: list[Tensor] = []
        self.observer: LayerObserver | None = None
        self._start = start
        self._scheduler = greenlet.getcurrent()
        self._batch = self._next = 0
        head = model.get_output_embeddings()
        self._original = [(module, module.forward) for module in (*layers, head)]
        for index, layer in enumerate(layers):
            layer.forward = self._gated(index, layer.forward)
        head.forward = self._held(head.forward)
        self._passes = [greenlet(self._forward) for _ in batches]
        with torch.no_grad():
            for batch, (coroutine, tokens) in enumerate(zip(self._passes, batches, strict=True)):
                self._batch = batch
                coroutine.switch(tokens)
        for _ in range(start):
            self._advance()

    def through(self, index: int) -> list[Tensor]:
        """Pass every batch through layer `index`; returns the hidden states [B, S, H] that came out."""
        assert index == self._next, "layers are passed in order"
        self._advance()
        return self.hidden

    def finish(self) -> list[Tensor]:
        """Pass every batch through what follows the layers; returns the logits [B, S, V] and ends the run."""
        self._advance()
        self.close()
        return self.logits

    def close(self) -> None:
        """End the run and give the modules their own `forward` back."""
        for module, forward in self._original:
            module.forward = forward
        for coroutine in self._passes:
            coroutine.throw()
        self._passes = []

    def _advance(self) -> None:
        self._next += 1
        with torch.no_grad():
            for batch, coroutine in enumerate(self._passes):
                self._batch = batch
                coroutine.switch()

    def _forward(self, tokens: Tensor) -> None:
        self.logits.append(self.model(input_ids=tokens, use_cache=False).logits)

    def _gated(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def gated(*args: Any, **kwargs: Any) -> Any:
            self._scheduler.switch()
            batch = self._batch
            if index < self._start:
                return self.hidden[batch]
            output = forward(*args, **kwargs)
            entering = args[0] if args else kwargs["hidden_states"]
            leaving = output if isinstance(output, Tensor) else output[0]
            if self.observer is not None:
                self.observer.layer(entering, leaving)
            self.hidden[batch] = leaving
            return output

        return gated

    def _held(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def held(*args: Any, **kwargs: Any) -> Any:
            self._scheduler.switch()
            return forward(*args, **kwargs)

        return held
