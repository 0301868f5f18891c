"""The bytes of a model that is to be quantized: of its experts, its other linear layers, and everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_compress.checkpoint.stream import TORCH_DTYPES, LayerStream
from moe_compress.compress.quantize.config import QuantizeConfig
from moe_compress.compress.quantize.plan import SHAPE_BYTES, ExpertShapes, QuantizePlan, matrix_bytes
from moe_compress.compress.quantize.shapes import LinearLayer, expert_shapes, linear_layers
from moe_compress.compress.quantize.storage import embedding_scheme, linear_savings, noted_bytes, scale_dtype_of
from moe_compress.errors import UnsupportedModelError
from moe_compress.models.layers import MoELayer, decoder_layers, find_moe_layers, owners
from moe_compress.models.skeleton import build_skeleton


@dataclass(frozen=True)
class Table:
    """Embeddings or output head; a head is read as a whole for every token."""

    shape: tuple[int, int]
    dtype: torch.dtype
    is_head: bool


@dataclass(frozen=True)
class Sizes:
    """A checkpoint of `stored_bytes` before it is quantized; scales are stored in `scale_dtype`.

    `shapes` are those of layers that store experts; what several layers use counts once. `shares` are `active_shares`.
    """

    stored_bytes: int
    shapes: tuple[ExpertShapes, ...]
    linears: tuple[LinearLayer, ...]
    tables: tuple[Table, ...]
    scale_dtype: torch.dtype
    shares: Mapping[int, float]

    @classmethod
    def of_stream(cls, stream: LayerStream) -> Sizes:
        """As they are on disk."""
        stored = [moe for layer, moe in stream.moe_layers.items() if layer not in stream.owners]
        shapes = tuple(expert_shapes(moe, stream.stored_dtypes) for moe in stored)
        linears = tuple(linear_layers(stream.layers, stream.moe_layers))
        index, heads = stream.checkpoint.index, _heads(stream.model)
        tied = stream.model.config.get_text_config().tie_word_embeddings
        tables = tuple(
            Table((index[name].shape[0], index[name].shape[1]), TORCH_DTYPES[index[name].dtype], module in heads)
            for module, names in stream.end_names.items()
            for name in names
            if not (tied and module is stream.model.get_output_embeddings())
        )
        shares = active_shares(stream.moe_layers.values(), stream.owners)
        return cls(index.nbytes, shapes, linears, tables, scale_dtype_of(stream), shares)

    @classmethod
    def of_config(cls, config: Any, stored_bytes: int) -> Sizes:
        """As the configuration has them, every weight in its dtype."""
        dtype = config.get_text_config().dtype or torch.bfloat16
        if dtype.itemsize not in (2, 4):
            raise UnsupportedModelError(f"weights of the type {dtype} cannot be quantized; convert them to bfloat16.")
        skeleton = build_skeleton(config)
        layers = find_moe_layers(skeleton)
        name = {4: "F32", 2: "BF16"}[dtype.itemsize]
        borrowed = owners(config)
        shapes = tuple(expert_shapes(layer, {}, name) for layer in layers if layer.layer not in borrowed)
        linears = tuple(linear_layers(decoder_layers(skeleton)[1], {layer.layer: layer for layer in layers}))
        heads = _heads(skeleton)
        ends = [skeleton.get_input_embeddings(), *(head for head in heads if len(heads) == 1)]
        tables = tuple(Table(tuple(module.weight.shape), dtype, module in heads) for module in ends)
        return cls(stored_bytes, shapes, linears, tables, dtype, active_shares(layers, borrowed))

    @property
    def expert_bytes(self) -> int:
        """Of the routed experts, their rows of the router included."""
        return sum(
            shape.num_experts * (shape.weights * shape.weight_bytes + shape.other_bytes) for shape in self.shapes
        )

    def saved_outside(self, config: QuantizeConfig, tier: str) -> int:
        """Bytes that quantized linear layers outside the experts, tables save, less what is noted there."""
        linears = [linear for linear in self.linears if linear.part in config.parts]
        noted = SHAPE_BYTES * len(linears) if tier == "stock" else 0
        return linear_savings(config, linears, self.scale_dtype) - noted + self._saved_tables(config, self.tables)

    def saved_by_part(self, config: QuantizeConfig, tier: str) -> dict[str, int]:
        """The same by part of the model."""
        noted = SHAPE_BYTES if tier == "stock" else 0
        saved = {
            part: linear_savings(config, linears, self.scale_dtype) - noted * len(linears)
            for part in config.parts
            if (linears := [linear for linear in self.linears if linear.part == part])
        }
        embedding, head = self.tables[0], self.tables[1:]
        saved |= {"embeddings": self._saved_tables(config, [embedding])}
        return saved | ({"head": self._saved_tables(config, head)} if head else {})

    def saved_unread(self, config: QuantizeConfig) -> int:
        """Of these bytes, those that no token reads: of embeddings that are only looked up."""
        return self._saved_tables(config, [table for table in self.tables if not table.is_head])

    def _saved_tables(self, config: QuantizeConfig, tables: Sequence[Table]) -> int:
        if config.embeddings is None:
            return 0
        scheme = embedding_scheme(config)
        return sum(
            table.shape[0] * table.shape[1] * table.dtype.itemsize - scheme.stored_bytes(*table.shape, table.dtype)
            for table in tables
        )

    def fixed_bytes(self, config: QuantizeConfig, tier: str) -> int:
        """Of everything but the routed experts, once it is quantized."""
        return self.stored_bytes - self.expert_bytes - self.saved_outside(config, tier)

    def bytes_after(self, plan: QuantizePlan, tier: str) -> int:
        """Of the quantized checkpoint."""
        return self.fixed_bytes(plan.config, tier) + plan.expert_bytes + noted_bytes(plan, 0, tier)

    def saved_in_experts(self, plan: QuantizePlan, tier: str) -> dict[int, int]:
        """By layer: bytes that the experts that stay have less."""
        noted = SHAPE_BYTES if tier == "stock" else 0
        saved = {}
        for shape, layer in zip(self.shapes, plan.layers, strict=True):
            packed = sum(
                matrix_bytes(option, *shape.projections[part], plan.config, shape.weight_bytes) + noted
                for part, options in layer.options.items()
                for option in options
            )
            saved[layer.layer] = len(layer.keep) * shape.weights * shape.weight_bytes - packed
        return saved


def active_shares(layers: Iterable[MoELayer], owners: Mapping[int, int]) -> dict[int, float]:
    """Of the experts that a layer stores, by layer, what a token reads if the router uses all of them alike.

    `owners` are the layers whose experts another one stores; those are read by one layer after the other.
    """
    shares: dict[int, float] = {}
    for moe in layers:
        stored_by = owners.get(moe.layer, moe.layer)
        shares[stored_by] = min(1.0, shares.get(stored_by, 0.0) + moe.experts_per_token / moe.num_experts)
    return shares


def active_bytes(by_layer: Mapping[int, int], shares: Mapping[int, float]) -> float:
    """Of bytes in the stored experts, by layer, those that a token reads."""
    return sum(shares[layer] * nbytes for layer, nbytes in by_layer.items())


def _heads(model: Any) -> list[Any]:
    """The modules whose tables are read as a whole: the head, and embeddings that are tied to it."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embeddings, head] if embeddings.weight is head.weight else [head]
