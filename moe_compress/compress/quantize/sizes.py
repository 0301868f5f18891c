"""The bytes of a model that is to be quantized: of its experts, its other linear layers, and everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.quantize.config import QuantizeConfig
from moe_compress.compress.quantize.plan import SHAPE_BYTES, ExpertShapes, QuantizePlan
from moe_compress.compress.quantize.shapes import LinearLayer, expert_shapes, linear_layers
from moe_compress.compress.quantize.storage import linear_savings, noted_bytes, scale_dtype_of
from moe_compress.models.layers import decoder_layers, find_moe_layers
from moe_compress.models.skeleton import build_skeleton


@dataclass(frozen=True)
class Sizes:
    """A checkpoint of `stored_bytes` before it is quantized; scales are stored in `scale_dtype`."""

    stored_bytes: int
    shapes: tuple[ExpertShapes, ...]
    linears: tuple[LinearLayer, ...]
    scale_dtype: torch.dtype

    @classmethod
    def of_stream(cls, stream: LayerStream) -> Sizes:
        """As they are on disk."""
        shapes = tuple(expert_shapes(moe, stream.stored_dtypes) for moe in stream.moe_layers.values())
        linears = tuple(linear_layers(stream.layers, stream.moe_layers))
        return cls(stream.checkpoint.index.nbytes, shapes, linears, scale_dtype_of(stream))

    @classmethod
    def of_config(cls, config: Any, stored_bytes: int) -> Sizes:
        """As the configuration has them, every weight in its dtype."""
        dtype = config.get_text_config().dtype
        skeleton = build_skeleton(config)
        layers = find_moe_layers(skeleton)
        name = {4: "F32", 2: "BF16"}[dtype.itemsize]
        shapes = tuple(expert_shapes(layer, {}, name) for layer in layers)
        linears = tuple(linear_layers(decoder_layers(skeleton)[1], {layer.layer: layer for layer in layers}))
        return cls(stored_bytes, shapes, linears, dtype)

    @property
    def expert_bytes(self) -> int:
        """Of the routed experts, their rows of the router included."""
        return sum(
            shape.num_experts * (shape.weights * shape.weight_bytes + shape.other_bytes) for shape in self.shapes
        )

    def saved_outside(self, config: QuantizeConfig, tier: str) -> int:
        """Bytes that quantized linear layers outside the experts save, less what is noted beside them."""
        linears = [linear for linear in self.linears if linear.part in config.parts]
        noted = SHAPE_BYTES * len(linears) if tier == "stock" else 0
        return linear_savings(config, linears, self.scale_dtype) - noted

    def fixed_bytes(self, config: QuantizeConfig, tier: str) -> int:
        """Of everything but the routed experts, once it is quantized."""
        return self.stored_bytes - self.expert_bytes - self.saved_outside(config, tier)

    def bytes_after(self, plan: QuantizePlan, tier: str) -> int:
        """Of the quantized checkpoint."""
        return self.fixed_bytes(plan.config, tier) + plan.expert_bytes + noted_bytes(plan, 0, tier)

    def active_share(self) -> float:
        """Of the routed experts, what a token uses."""
        return sum(shape.top_k for shape in self.shapes) / sum(shape.num_experts for shape in self.shapes)
