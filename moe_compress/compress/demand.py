"""What the sweeps over a model's layers take: memory, scratch disk, traffic and arithmetic, from its empty skeleton.

One layer is resident at a time: weights outside its experts in float32, experts in the type they are stored in. Peaks
of memory are the largest of these moments, with P the parameter that is largest in a layer and H the hidden size:

* loading: the layer and P once more, which is put together from the tensors of single experts;
* running a batch: the layer and the batch's activations, `ACTIVATIONS` values of width H for each of its tokens and
  what its experts compute;
* changing: the layer as it was and as it becomes.

Beside them lie the hidden states of all tokens (what left the last layer, the embeddings that every forward pass holds
on to, and the bytes that are written to disk after each layer) and the statistics of the layers so far, once more while
they are saved. On an accelerator statistics of finished layers stay in the host's memory, and all else on the device.

These are estimates: `benchmarks/plan_accuracy` sets them against runs. Not covered: what single transformations need
beyond this, unless they say so (`Step.demands`), and models whose layers hand on more than hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_compress.calibrate.ablation import COPIES, HIDDEN_BYTES
from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.locality import CACHE_RATIOS, SEGMENTS
from moe_compress.eval.cost import cost
from moe_compress.models.layers import decoder_layers, find_moe_layers
from moe_compress.models.skeleton import build_skeleton

FLOAT = 4  # bytes of float32, which everything is computed in
DOUBLE = 8  # bytes of float64, which sums are kept in
ACTIVATIONS = 16  # float32 values of a token at the widest moment of a layer, in multiples of the hidden size
HIDDEN_COPIES = 3  # of the hidden states of all tokens
PROBE_TOKENS = 32  # that pass the layers while they are written
CHANNEL_SUMS, PAIR_SUMS = 3, 2  # statistics [E, H] and [E, E] that a sweep keeps of a layer


@dataclass(frozen=True)
class LayerSize:
    """One decoder layer, in elements: of single parameters of its experts, and of everything else."""

    experts: tuple[int, ...]
    others: int
    num_experts: int = 0
    top_k: int = 0
    width: int = 0  # of an expert's input and output
    inner: int = 0  # of its down projection's input


@dataclass(frozen=True)
class ModelSize:
    """The parts of a model that take memory; `stored` is the bytes of a stored weight."""

    layers: tuple[LayerSize, ...]
    embedding: int
    head: int  # 0 where it is the embedding
    hidden_size: int
    stored: int
    stored_bytes: int
    flops_per_token: float

    @classmethod
    def of(cls, config: Any, stored_bytes: int) -> ModelSize:
        """Of the model that a configuration describes."""
        model: Any = build_skeleton(config)
        moe_layers = {found.layer: found for found in find_moe_layers(model)}
        layers = []
        for index, layer in enumerate(decoder_layers(model)[1]):
            everything = sum(parameter.numel() for parameter in layer.parameters())
            moe = moe_layers.get(index)
            if moe is None:
                layers.append(LayerSize((), everything))
                continue
            experts = tuple(parameter.numel() for parameter in moe.experts.parameters())
            down: Any = moe.experts.down_proj
            inner = down.shape[1 if moe.experts.is_transposed else 2]
            layers.append(LayerSize(experts, everything - sum(experts), moe.num_experts, moe.top_k, moe.width, inner))
        text = config.get_text_config()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        dtype = text.dtype if isinstance(text.dtype, torch.dtype) else torch.float32
        return cls(
            layers=tuple(layers),
            embedding=embedding.numel(),
            head=0 if head is embedding else head.numel(),
            hidden_size=text.hidden_size,
            stored=dtype.itemsize,
            stored_bytes=stored_bytes,
            flops_per_token=cost(config).flops_per_token,
        )

    @property
    def stored_layers(self) -> int:
        """Bytes of the decoder layers on disk."""
        tables = (self.embedding + self.head) * self.stored
        return max(0, self.stored_bytes - tables)

    def resident(self, layer: LayerSize) -> int:
        """Bytes of a layer in memory."""
        return sum(layer.experts) * self.stored + layer.others * FLOAT

    def loading(self, layer: LayerSize) -> int:
        """The same while it is loaded."""
        return self.resident(layer) + max(layer.experts, default=0) * self.stored

    def tables_loading(self) -> int:
        """Bytes while the larger one of embeddings and head is loaded."""
        return max(self.embedding, self.head) * (FLOAT + self.stored)

    def kept_tables(self) -> int:
        """Bytes of the embeddings that stay because they are the head too."""
        return 0 if self.head else self.embedding * FLOAT

    def activations(self, layer: LayerSize, tokens: int) -> int:
        """Bytes that a batch of so many tokens takes inside a layer."""
        routed = layer.top_k * (2 * layer.width + 3 * layer.inner / max(1, layer.num_experts))
        return round(FLOAT * tokens * (ACTIVATIONS * self.hidden_size + routed))

    def statistics(self, layer: LayerSize) -> int:
        """Bytes that a sweep keeps of a layer."""
        experts = layer.num_experts
        local = sum(segment + 1 for segment in SEGMENTS) + len(CACHE_RATIOS)
        return DOUBLE * experts * (CHANNEL_SUMS * layer.width + PAIR_SUMS * experts + local)


@dataclass(frozen=True)
class Demand:
    """What one stage of a step takes.

    `host` is memory in any case, `computed` where tensors are computed, in bytes and at the worst moment, the program
    itself not counted (`on_each` is that of one device, where several share it); `scratch` bytes on disk beside
    checkpoints, `moved` bytes of weights that are read, converted and written, `flops` the arithmetic.
    """

    stage: str
    host: int
    computed: int
    on_each: int | None = None
    scratch: int = 0
    moved: int = 0
    flops: float = 0.0


def score_demand(size: ModelSize, calibration: CalibrationConfig, *, extra: int = 0, flops: float = 0.0) -> Demand:
    """The sweep that measures the experts; `extra` bytes and `flops` are what a transformation adds to it."""
    tokens, batch = num_tokens(calibration), batch_tokens(calibration)
    kept = sum(size.statistics(layer) for layer in size.layers)
    statistics = max((size.statistics(layer) for layer in size.layers), default=0)
    computed = max(size.tables_loading(), _sweep(size, tokens, batch) + statistics + extra)
    return Demand(
        "score",
        host=2 * kept,
        computed=computed,
        scratch=2 * hidden_bytes(size, tokens),
        moved=size.stored_layers,
        flops=size.flops_per_token * tokens + flops,
    )


def apply_demand(
    before: ModelSize, after: ModelSize, tokens: int, batch: int, *, extra: int = 0, flops: float = 0.0
) -> Demand:
    """The sweep that writes the new checkpoint while `tokens` calibration tokens (0: none) pass the changed layers."""
    changing = max(
        before.resident(old) + sum(new.experts) * after.stored
        for old, new in zip(before.layers, after.layers, strict=True)
    )
    passing = _sweep(after, tokens + PROBE_TOKENS, max(batch if tokens else 0, PROBE_TOKENS))
    loading = max(before.loading(layer) for layer in before.layers) + before.kept_tables()
    hidden = HIDDEN_COPIES * hidden_bytes(after, tokens)
    return Demand(
        "apply",
        host=0,
        computed=max(before.tables_loading(), loading + hidden, changing + hidden, passing + extra),
        scratch=2 * hidden_bytes(after, tokens),
        moved=before.stored_bytes + after.stored_bytes,
        flops=after.flops_per_token * tokens + flops,
    )


def ablation_demand(size: ModelSize, calibration: CalibrationConfig, samples: int) -> Demand:
    """The passes without each expert, from its layer to the head: half of the model's layers on average."""
    samples = min(samples, calibration.num_samples)
    tokens = samples * calibration.sequence_length
    batch = min(samples, calibration.batch_size) * calibration.sequence_length
    experts = sum(layer.num_experts for layer in size.layers)
    together = min(experts + 1, max(2, HIDDEN_BYTES // max(1, COPIES * hidden_bytes(size, tokens))))
    groups = -(-experts // (together - 1)) if experts else 0
    passing = max(max(size.loading(one), size.resident(one) + size.activations(one, batch)) for one in size.layers)
    tables = (size.embedding + size.head) * FLOAT  # both stay: passes begin at any time
    return Demand(
        "ablate",
        host=0,
        computed=passing + tables + COPIES * together * hidden_bytes(size, tokens),
        scratch=len(size.layers) * hidden_bytes(size, tokens),
        moved=round(size.stored_layers * (1 + groups / 2)),
        flops=size.flops_per_token * tokens * (1 + experts / 2),
    )


def hidden_bytes(size: ModelSize, tokens: int) -> int:
    """Of the hidden states of so many tokens."""
    return FLOAT * tokens * size.hidden_size


def num_tokens(calibration: CalibrationConfig) -> int:
    """Calibration tokens in all."""
    return calibration.num_samples * calibration.sequence_length


def batch_tokens(calibration: CalibrationConfig) -> int:
    """Calibration tokens that pass a layer together."""
    return min(calibration.batch_size, calibration.num_samples) * calibration.sequence_length


def _sweep(size: ModelSize, tokens: int, batch: int) -> int:
    """Bytes while all tokens pass the layers, a batch at a time."""
    layers = max(
        max(size.loading(layer), size.resident(layer) + size.activations(layer, batch)) for layer in size.layers
    )
    return layers + HIDDEN_COPIES * hidden_bytes(size, tokens) + size.kept_tables()
