"""All batches through the model together, one decoder layer at a time.

A model's own `forward` knows its embeddings, masks and positions; only the order of the work has to change, so that
each layer is needed once for all batches instead of once per batch. Every batch's forward pass runs as a coroutine that
stops before each decoder layer and goes on when told to.

    run = Lockstep(model, layers, batches)
    for index in range(len(layers)):
        ...                       # make the layer's weights resident
        run.through(index)        # every batch passes the layer
    logits = run.finish()

Before it is passed, a layer may be rehearsed: run up to some place inside it, where a hook looks at the tensors and
then ends the batch's turn (`Enough`; the batch starts the layer anew when it is next run) or lets it wait right there
(`hold`), so that the layer can be changed in the middle of its forward pass and nothing is computed twice.

Not covered: caches; hidden states of all batches stay in memory. Gradients reach back to the last layer's output alone
(`finish`); what calls `recorder` sees is enough to run the layers again, last to first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from greenlet import greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.errors import ResumeError, UnsupportedModelError


class Enough(Exception):
    """Raised inside a rehearsal by a hook that has seen all it wants of this batch."""


class LayerObserver(Protocol):
    """Sees what goes into and comes out of a decoder layer, batch by batch."""

    def layer(self, input_BSH: Tensor, output_BSH: Tensor) -> None: ...


class Lockstep:
    """The forward passes of `batches` (token ids [B, S] each), held before the same decoder layer.

    `start` and `hidden` continue an earlier run: layers before `start` are skipped, and `hidden` is what that run had
    under the same name when it stood there.

    Raises `ResumeError` where layers hand on more than they return (shared keys and values, sums over earlier layers),
    so that the run cannot be continued in the middle.
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
        self._left: list[list[Tensor]] = _per_batch(hidden[:-1], len(batches))
        self._entering = [0] * len(batches)
        self.logits: list[Tensor] = []
        self.observer: LayerObserver | None = None
        # called before each layer with the batch's number and the layer's arguments
        self.recorder: Callable[[int, tuple[Any, ...], dict[str, Any]], None] | None = None
        self._leaves: list[Tensor] | None = None
        self._tokens = list(batches)
        self._starts = [start] * len(batches)  # layers before that are skipped
        self._scheduler = greenlet.getcurrent()
        self.batch = 0  # the one that is running
        self._next = 0
        self._rehearsing = False
        head = model.get_output_embeddings()
        self._original = [(module, module.forward) for module in (*layers, head)]
        for index, layer in enumerate(layers):
            layer.forward = self._gated(index, layer.forward)
        head.forward = self._held(head.forward)
        self._passes = [greenlet(self._forward) for _ in batches]
        with torch.no_grad():
            for batch, (coroutine, tokens) in enumerate(zip(self._passes, batches, strict=True)):
                self.batch = batch
                coroutine.switch(tokens)
        for _ in range(start):
            self._advance()
        if start and self._entering != hidden[-1].tolist():
            self.close()
            raise ResumeError(
                f"The layers of {type(model).__name__} hand on more than they return, so an interrupted run cannot go "
                "on in the middle; start over with --force."
            )

    def fork(self, batch: int) -> int:
        """Another pass of the tokens of `batch`, standing where that stands; returns its number.

        Raises `UnsupportedModelError` where layers hand on more than they return. Input embeddings must be resident.
        """
        number = len(self._passes)
        self._left.append(list(self._left[batch]))
        self._entering.append(0)
        self._tokens.append(self._tokens[batch])
        self._starts.append(self._next)
        self._passes.append(greenlet(self._forward))
        self.batch = number
        with torch.no_grad():
            self._passes[number].switch(self._tokens[number])
            for _ in range(self._next):
                self._passes[number].switch()
        if self._entering[number] != self._entering[batch]:
            self.close()
            raise UnsupportedModelError(
                f"The layers of {type(self.model).__name__} hand on more than they return, so a pass cannot begin in "
                "the middle."
            )
        return number

    @property
    def hidden(self) -> list[Tensor]:
        """What a later run needs to go on from here: all that left the last layer, batch by batch, and checksums [N].

        The checksums are those of all that is about to enter the next layer.
        """
        return [*(tensor for left in self._left for tensor in left), torch.tensor(self._entering)]

    def rehearse(self, index: int, count: int | None = None) -> None:
        """Run layer `index` on the first `count` batches (all if None); no batch passes it, outputs are forgotten.

        A hook may end a batch's turn with `Enough`, or with `hold`, in which case it goes on from there when it is next
        run.
        """
        assert index == self._next, "layers are passed in order"
        self._rehearsing = True
        with torch.no_grad():
            for batch, coroutine in enumerate(self._passes[:count]):
                self.batch = batch
                coroutine.switch(True)
        self._rehearsing = False

    def hold(self) -> None:
        """Called by a hook inside the layer: let the batch wait here until it is run again."""
        self._scheduler.switch()

    def through(self, index: int, count: int | None = None) -> list[Tensor]:
        """Pass every batch through layer `index`; returns the hidden states [B, S, H] that came out.

        With `count` only the first so many; the others end here.
        """
        assert index == self._next, "layers are passed in order"
        self._end(len(self._passes) if count is None else count)
        self._advance()
        return [left[0] for left in self._left]

    def finish(self) -> list[Tensor]:
        """Pass all batches through what follows the layers, and end the run; returns their logits [B, S, V]."""
        self._advance()
        self.close()
        return self.logits

    def finish_each(self) -> Iterator[Tensor]:
        """As `finish` for all batches, but only one batch's logits are in memory at a time."""
        for batch, coroutine in enumerate(self._passes):
            self.batch = batch
            with torch.no_grad():
                coroutine.switch()
            yield self.logits.pop()
        self.close()

    def last_gradients(self, index: int, loss: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """Pass the last layer `index` and what follows it; ends the run.

        `loss(batch, logits [B, S, V])` is a scalar. Returns its gradient by the hidden states [B, S, H] that left the
        layer, batch by batch; only one batch's logits are in memory at a time.
        """
        assert index == self._next == len(self.layers) - 1
        self._leaves = []
        gradients = []
        for batch, coroutine in enumerate(self._passes):
            self.batch = batch
            with torch.enable_grad():
                coroutine.switch()
                coroutine.switch()
                loss(batch, self.logits.pop()).backward()
            leaf = self._leaves.pop()
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        self.close()
        return gradients

    def close(self) -> None:
        """End the run and give the modules their own `forward` back."""
        for module, forward in self._original:
            module.forward = forward
        self._end(0)

    def _end(self, count: int) -> None:
        """Leave all batches but the first `count` where they are, for good."""
        for coroutine in self._passes[count:]:
            coroutine.throw()
        for entries in (self._passes, self._left, self._entering, self._tokens, self._starts):
            del entries[count:]

    def _advance(self) -> None:
        self._next += 1
        with torch.no_grad():
            for batch, coroutine in enumerate(self._passes):
                self.batch = batch
                coroutine.switch()

    def _forward(self, tokens: Tensor) -> None:
        self.logits.append(self.model(input_ids=tokens, use_cache=False).logits)

    def _gated(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def gated(*args: Any, **kwargs: Any) -> Any:
            self._enter(args, kwargs)
            rehearsed = self._rehearsals(forward, args, kwargs)
            batch = self.batch
            if index < self._starts[batch]:
                return _output(self._left[batch])
            if self.recorder is not None:
                self.recorder(batch, args, kwargs)
            if self._leaves is not None:
                with torch.no_grad():
                    output = _detached(forward(*args, **kwargs))
                self._leaves.append(_tensors(output)[0])
                return output
            output = forward(*args, **kwargs) if rehearsed is None else rehearsed
            self._left[batch] = _tensors(output)
            if self.observer is not None:
                self.observer.layer(args[0] if args else kwargs["hidden_states"], self._left[batch][0])
            return output

        return gated

    def _held(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def held(*args: Any, **kwargs: Any) -> Any:
            self._enter(args, kwargs)
            self._scheduler.switch()
            return forward(*args, **kwargs)

        return held

    def _enter(self, *arguments: Any) -> None:
        self._entering[self.batch] = _checksum(arguments)

    def _rehearsals(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the others go on, and rehearse as often as is asked for.

        Returns the layer's output when the batch had waited inside the last rehearsal until it was to pass, else None.
        """
        while self._scheduler.switch():
            with contextlib.suppress(Enough):
                output = forward(*args, **kwargs)
                if not self._rehearsing:
                    return output
        return None


def _per_batch(tensors: Sequence[Tensor], num_batches: int) -> list[list[Tensor]]:
    each = len(tensors) // num_batches
    return [list(tensors[batch * each : (batch + 1) * each]) for batch in range(num_batches)]


def _tensors(output: Any) -> list[Tensor]:
    """What a layer returns, as a list of tensors; nothing is kept as an empty one."""
    items = [output] if isinstance(output, Tensor) else list(output)
    return [torch.empty(0) if item is None else item for item in items]


def _detached(output: Any) -> Any:
    """A layer's output whose hidden states are a leaf that wants a gradient."""
    if isinstance(output, Tensor):
        return output.detach().requires_grad_()
    return (output[0].detach().requires_grad_(), *output[1:])


def _output(tensors: list[Tensor]) -> Any:
    """What a layer returned, from the list of tensors."""
    items = [tensor if tensor.numel() else None for tensor in tensors]
    return items[0] if len(items) == 1 else tuple(items)


def _checksum(value: Any) -> int:
    """Sum over the words of all tensors in an argument, however nested."""
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1)
        words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
        # Words of 64 bits where they fit: a sum of shorter ones would first make a longer copy of them all.
        whole = flat.nbytes % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
        return int(flat.view(torch.int64 if whole else words).sum(dtype=torch.int64))
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return sum(_checksum(item) for item in items) % 2**62
