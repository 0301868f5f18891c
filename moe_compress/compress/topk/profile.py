"""What it costs that one layer uses fewer experts per token: the profile of Alloc-MoE (arXiv 2604.08133), by streaming.

S[i, k] is the perplexity with the layers before i as they are, layer i with k experts, and all layers after it with
one. With its own number, layer i gives what layer i + 1 gives with one expert, so L (K - 1) + 1 values are measured.
Every value is a pass of the calibration tokens through the model. The passes go through it side by side, as many as
memory for their hidden states allows; each sweep over the layers takes the next ones, and is kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.topk.config import TopkConfig
from moe_compress.models.layers import MoELayer
from moe_compress.models.lockstep import Lockstep
from moe_compress.models.routing import Routing
from moe_compress.progress import Stage
from moe_compress.runtime.routing import RoutingRules, set_top_k
from moe_compress.runtime.trace import router_of

HIDDEN_BYTES = 1 << 30  # of hidden states held at a time


@dataclass(frozen=True)
class Variant:
    """The MoE layer at `position` uses `k` experts, those before it their own number, those after it one."""

    position: int
    k: int

    def experts(self, position: int, own: int) -> int:
        """Experts that the layer at `position` uses."""
        return own if position < self.position else self.k if position == self.position else 1


def variants(own: Sequence[int]) -> list[Variant]:
    """All that have to be measured, of layers with these numbers of experts per token; the last is the model itself."""
    fewer = [Variant(position, k) for position, count in enumerate(own) for k in range(1, count)]
    return [*fewer, Variant(len(own), 0)]


def profile(
    source: Checkpoint, tokens: Tensor, config: TopkConfig, *, batch_size: int, device: str, file: Path, stage: Stage
) -> dict[int, list[float]]:
    """Perplexities of each MoE layer with 1, 2, ... experts up to its own number, on `tokens` [N, S].

    What is measured is kept in `file`, and not measured again. `stage` advances once for every variant.
    """
    found: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    layers = [*LayerStream(source, device).moe_layers.values()]
    own = [moe.top_k for moe in layers]
    wanted = variants(own)
    hidden_bytes = 4 * tokens.numel() * source.config.get_text_config().hidden_size
    together = max(1, HIDDEN_BYTES // hidden_bytes)
    for start in range(0, len(wanted), together):
        chunk = wanted[start : start + together]
        if not all(_key(variant) in found for variant in chunk):
            losses = _losses(source, tokens, chunk, config, batch_size, device)
            found |= {_key(variant): loss for variant, loss in zip(chunk, losses, strict=True)}
            write_json(file, found)
        for _ in chunk:
            stage.advance()
    perplexity = {variant: float(np.exp(found[_key(variant)])) for variant in wanted}
    last = [*(Variant(position + 1, 1) for position in range(len(own) - 1)), wanted[-1]]
    return {
        moe.layer: [perplexity[Variant(position, k)] for k in range(1, own[position])]
        + [_with_all(position, own, perplexity, last)]
        for position, moe in enumerate(layers)
    }


def _with_all(position: int, own: Sequence[int], perplexity: dict[Variant, float], last: Sequence[Variant]) -> float:
    """Of a layer with all its experts: the next layer's with one, where that is fewer than it has."""
    while position < len(own) - 1 and own[position + 1] == 1:
        position += 1
    return perplexity[last[position]]


def _losses(
    source: Checkpoint, tokens: Tensor, chunk: Sequence[Variant], config: TopkConfig, batch_size: int, device: str
) -> list[float]:
    """Mean loss per next token of each variant, in one sweep over the layers."""
    stream = LayerStream(source, device)
    stream.load_trunk()
    batches = [batch.to(device) for batch in tokens.split(batch_size)]
    run = Lockstep(stream.model, stream.layers, batches * len(chunk))
    stream.release_embeddings()
    try:
        for position, moe in enumerate(stream.moe_layers.values()):
            _Reduced(position, moe, chunk, config, run, len(batches)).attach()
        for index in range(len(stream.layers)):
            stream.load(index)
            run.through(index)
            stream.release(index)
        stream.load_head()
        sums = [0.0] * len(chunk)
        for number, logits in enumerate(run.finish_each()):
            batch = batches[number % len(batches)]
            losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum")
            sums[number // len(batches)] += float(losses)
    finally:
        run.close()
    return [total / (tokens.numel() - len(tokens)) for total in sums]


class _Reduced:
    """Makes a layer use as many experts as the variant says whose turn it is."""

    def __init__(
        self, position: int, moe: MoELayer, chunk: Sequence[Variant], config: TopkConfig, run: Lockstep, batches: int
    ) -> None:
        self.position, self.moe, self.chunk, self.run, self.batches = position, moe, chunk, run, batches
        self.over = config.normalise_over

    def attach(self) -> None:
        router_of(self.moe).register_forward_pre_hook(self._before_router)
        self.moe.experts.register_forward_pre_hook(self._before_experts, with_kwargs=True)

    def _experts(self) -> tuple[int, int]:
        """How many experts run, and how many the router picks."""
        own = self.moe.top_k
        k = self.chunk[self.run.batch // self.batches].experts(self.position, own)
        if k == own or self.over == "picked":
            return k, own
        return k, k if self.over == "kept" else int(self.over)

    def _before_router(self, module: Any, inputs: Any) -> None:
        set_top_k(self.moe.block, self.moe.experts, self._experts()[1])

    def _before_experts(self, module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        hidden_TH, index_TK, gate_TK = (*inputs, *keywords.values())
        k, picked = self._experts()
        rules = RoutingRules(Routing(top_k=k, normalise_over=picked), self.moe.num_experts, self.moe.num_groups)
        return (hidden_TH, *rules.apply(index_TK, gate_TK)), {}


def _key(variant: Variant) -> str:
    return f"{variant.position} {variant.k}"
