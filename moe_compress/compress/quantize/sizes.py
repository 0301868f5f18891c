"""The bytes of a model that is to be quantized: of its experts, its other linear layers, and everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch

from moe_compress.checkpoint.stream import TORCH_DTYPES, LayerStream
from moe_compress.compress.quantize.config import BITSANDBYTES, GROUP_SIZES, QuantizeConfig
from moe_compress.compress.quantize.plan import SHAPE_BYTES, ExpertShapes, QuantizePlan, matrix_bytes
from moe_compress.compress.quantize.shapes import LinearLayer, expert_shapes, linear_layers
from moe_compress.compress.quantize.storage import embedding_scheme, linear_savings, noted_bytes, scale_dtype_of
from moe_compress.errors import UnsupportedModelError, UsageError
from moe_compress.models.layers import MoELayer, decoder_layers, find_moe_layers, owners
from moe_compress.models.skeleton import build_skeleton

LEAST_HINT = 8  # group sizes below this are not proposed: their scales take more than they save


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


def with_group_size(config: QuantizeConfig, sizes: Sizes) -> QuantizeConfig:
    """The settings with the group size that `auto` stands for: the largest that divides every matrix it holds for."""
    widths = {width for _, width in _grouped(config, sizes)["group_size"]}
    if config.group_size != "auto" or not widths:
        return config
    size = next((size for size in GROUP_SIZES if all(width % size == 0 for width in widths)), "channel")
    return config.model_copy(update={"group_size": size})


def check_group_sizes(config: QuantizeConfig, sizes: Sizes) -> None:
    """Raise `UsageError` where a group size does not divide the rows of a matrix that it holds for."""
    for setting, matrices in _grouped(config, sizes).items():
        part, _, _ = setting.rpartition(".")
        size = getattr(config, part).group_size if part else config.group_size
        if not isinstance(size, int):
            continue
        wrong = next((found for found in matrices if found[1] % size), None)
        if wrong is not None:
            common = gcd(*(width for _, width in matrices))
            fitting = [str(divisor) for divisor in range(LEAST_HINT, common + 1) if common % divisor == 0]
            one = f"one of {', '.join(fitting)}, which divide all that it holds for, or " if fitting else ""
            raise UsageError(
                f"{setting}: {size} does not divide the {wrong[1]} inputs of {wrong[0]}; choose {one}`channel`."
            )


def _grouped(config: QuantizeConfig, sizes: Sizes) -> dict[str, list[tuple[str, int]]]:
    """Each setting that is a group size, and the matrices it holds for: what they are, and their inputs."""
    found: dict[str, list[tuple[str, int]]] = {"group_size": []}

    def enter(part: str, what: str, width: int) -> None:
        own = getattr(config, part).group_size if part else None
        found.setdefault("group_size" if own in (None, "auto") else f"{part}.group_size", []).append((what, width))

    if config.method not in BITSANDBYTES:
        for shape in sizes.shapes:
            for name, (_, width) in shape.projections.items():
                enter("", f"{name} in layer {shape.layer}", width)
        for linear in (linear for linear in sizes.linears if linear.part in config.parts):
            enter(linear.part, f"{linear.path} in layer {linear.layer}", linear.shape[1])
    for number, table in enumerate(sizes.tables if config.embeddings is not None else ()):
        enter("embeddings", "the output head" if number else "the embeddings", table.shape[1])
    return found


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
