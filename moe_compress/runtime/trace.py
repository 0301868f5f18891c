"""What the routers of a model did in its last forward passes, and how to make them do it again: hooks for training.

    with RoutingTrace(layers) as trace:                 # layers: find_moe_layers(model)
        model(input_ids=tokens)
        chosen = trace.last(3)                          # logits, probabilities, rows and gate values of layer 3
    with replayed(layers, {3: chosen.row_TK, ...}):
        model(input_ids=tokens)                         # the same experts, gate values anew by the present weights

Rows are those of the router: a zero expert has its own. Everything keeps its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_compress.errors import UnsupportedModelError
from moe_compress.models.layers import MoELayer
from moe_compress.models.routing import router_rows

# How routers turn logits into scores; a gate value is a score, perhaps divided by the sum of those picked, and scaled.
SCORES = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}
GIVEN = "given"  # the router hands out probabilities instead of logits
SAME = 1e-2  # largest difference between the gate values' shares and what a kind of score makes of the logits


@dataclass(frozen=True)
class RouterPass:
    """One call of one router, for T tokens."""

    moe: MoELayer
    logits_TR: Tensor
    row_TK: Tensor
    gate_TK: Tensor

    @property
    def probability_TR(self) -> Tensor:
        """The router's scores of all its rows, as shares of their sum: what a balance loss averages."""
        logits_TR = self.logits_TR.float()
        kind = score_kind(logits_TR, self.row_TK, self.gate_TK)
        scores_TR = logits_TR if kind == GIVEN else SCORES[kind](logits_TR)
        return scores_TR / scores_TR.sum(dim=-1, keepdim=True)

    @property
    def zero_R(self) -> Tensor:
        """Which rows stand for no expert: zero experts, and null experts that the family has itself."""
        routed, _ = router_rows(self.moe.num_experts, self.moe.routing.zero_experts, self.moe.num_groups)
        zero = torch.ones(self.logits_TR.shape[1], dtype=torch.bool, device=self.logits_TR.device)
        zero[routed] = False
        return zero

    @property
    def skipped_TK(self) -> Tensor:
        """Which slots went to no expert."""
        return self.zero_R[self.row_TK] | (self.gate_TK == 0)


class RoutingTrace:
    """Notes every call of the routers of these layers, from entering to leaving the context."""

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self.layers = {moe.layer: moe for moe in layers}
        self.passes: dict[int, list[RouterPass]] = {layer: [] for layer in self.layers}
        self._hooks: list[Any] = []

    def __enter__(self) -> RoutingTrace:
        for layer, moe in self.layers.items():
            logits: list[Tensor] = []

            def see_router(module: Any, inputs: Any, output: Any, logits: list[Tensor] = logits) -> None:
                logits.append(output[0].flatten(0, -2))

            def see_experts(
                module: Any,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                layer: int = layer,
                logits: list[Tensor] = logits,
            ) -> None:
                _, row_TK, gate_TK = (*args, *kwargs.values())
                moe, logits_TR = self.layers[layer], logits.pop()
                if logits_TR.shape[1] > moe.num_experts + moe.routing.zero_experts:  # ZAYA hides its null expert
                    row_TK = row_TK.masked_fill(gate_TK == 0, logits_TR.shape[1] - 1)
                self.passes[layer].append(RouterPass(moe, logits_TR, row_TK, gate_TK))

            self._hooks.append(router_of(moe).register_forward_hook(see_router))
            self._hooks.append(moe.experts.register_forward_pre_hook(see_experts, with_kwargs=True, prepend=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def last(self, layer: int) -> RouterPass:
        """The last call in a layer."""
        return self.passes[layer][-1]

    def rows_BSK(self, layer: int, batch_size: int) -> Tensor:
        """The rows picked for whole sequences that went through in pieces, such as a prompt and then token by token."""
        pieces = [found.row_TK.unflatten(0, (batch_size, -1)) for found in self.passes[layer]]
        return torch.cat(pieces, dim=1)


@contextmanager
def replayed(layers: Sequence[MoELayer], rows: Mapping[int, Tensor]) -> Iterator[None]:
    """Let the routers of the layers that `rows` names pick these rows ([T, K], or [B, S, K]) instead of their own.

    Raises `UnsupportedModelError` where a router does not pick by a top-k of all its rows.
    """
    with ExitStack() as restored:
        for moe in layers:
            if moe.layer in rows:
                router: Any = router_of(moe)
                router.forward = _Replaying(router.forward, rows[moe.layer].flatten(0, -2), moe)
                restored.callback(delattr, router, "forward")
        yield


def router_of(moe: MoELayer) -> nn.Module:
    """The module inside the block that scores the experts."""
    owned = next(name for name in moe.router_tensors() if "." in name)
    return moe.block.get_submodule(owned.partition(".")[0])


def score_kind(logits_TR: Tensor, row_TK: Tensor, gate_TK: Tensor) -> str:
    """How a router scores, seen from what came of its logits: the shares of the slots of a token tell.

    Where nothing fits, `softmax`.
    """
    with torch.no_grad():
        if bool((logits_TR >= 0).all()) and bool(((logits_TR.sum(dim=-1) - 1).abs() < SAME).all()):
            return GIVEN
        gate_TK = gate_TK.float()
        errors = {}
        for kind, score in SCORES.items():
            picked_TK = score(logits_TR).gather(1, row_TK).masked_fill(gate_TK == 0, 0)
            difference = picked_TK / picked_TK.sum(dim=1, keepdim=True) - gate_TK / gate_TK.sum(dim=1, keepdim=True)
            errors[kind] = float(difference.nan_to_num().abs().max())
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < SAME else "softmax"


class _Replaying:
    """Stands for a router's `forward`."""

    def __init__(self, forward: Any, row_TK: Tensor, moe: MoELayer) -> None:
        self.forward, self.row_TK, self.moe = forward, row_TK, moe

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Picking(self.row_TK, self.moe) as picking:
            found = self.forward(*args, **kwargs)
        if not picking.calls:
            raise UnsupportedModelError(
                f"The router of `{self.moe.block_name}` ({type(self.moe.block).__name__}) does not pick its experts by "
                "one top-k of their scores, so its choice cannot be replayed."
            )
        return found


class _Picking(TorchFunctionMode):
    """Answers the top-k over all rows of a router with given rows.

    A router whose groups are one asks for the best rows of that group before, and what it is told makes no difference.
    """

    def __init__(self, row_TK: Tensor, moe: MoELayer) -> None:
        super().__init__()
        self.row_TK, self.top_k, self.calls = row_TK, moe.top_k, 0
        self.fewest = moe.num_experts + moe.routing.zero_experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk):
            scores, count = args[0], args[1] if len(args) > 1 else kwargs["k"]
            of_rows = scores.shape[-1] >= self.fewest and scores.shape[:-1].numel() == len(self.row_TK)
            if of_rows and count == self.top_k:
                self.calls += 1
                picked = self.row_TK.view(*scores.shape[:-1], count)
                return torch.return_types.topk((scores.gather(-1, picked), picked))
        return func(*args, **kwargs)
