"""What quantizing takes beyond a sweep over the layers: second moments, float32 copies of matrices, trial after trial.

GPTQ's arithmetic for a matrix [O, I] with n tokens: n I^2 for the second moment, I^3 to factorise and invert it, O I^2
to hand errors on. Rounding and the search for scales are no matrix products: they are taken for `ROUNDING` operations
per weight, at the rate of matrix products. Both were set by `benchmarks/plan_accuracy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.compress.demand import (
    FLOAT,
    Demand,
    LayerSize,
    ModelSize,
    apply_demand,
    batch_tokens,
    hidden_bytes,
    num_tokens,
    score_demand,
)
from moe_compress.compress.quantize.config import BITSANDBYTES, QuantizeConfig
from moe_compress.compress.quantize.plan import SUPER_EXPERT_BITS, ExpertShapes
from moe_compress.compress.quantize.shapes import LinearLayer
from moe_compress.compress.quantize.sizes import Sizes

ROUNDING = 3000  # operations for each weight that is rounded, its share of the search for scales included
HESSIAN_BYTES = 4 << 30  # of second moments held at a time (`moments`)
HELD_BYTES = 1 << 30  # of activations in passes that wait inside a layer (`moments`)
CHUNK_BYTES = 1 << 30  # of matrices and moments while costs are measured (`sensitivity`)
GPTQ_BYTES = 1 << 26  # of what GPTQ works on at a time (`gptq`)
QUANTIZED_BYTES = 1 << 28  # of experts that are quantized together (`apply`)


@dataclass(frozen=True)
class Matrices:
    """Matrices of one layer that are quantized together: `count` of [rows, columns], the inputs of `tokens` each."""

    count: int
    rows: int
    columns: int
    tokens: float

    @property
    def weights(self) -> int:
        return self.count * self.rows * self.columns

    @property
    def moments(self) -> int:
        """Bytes of their inputs' second moments."""
        return FLOAT * self.count * self.columns**2

    @property
    def worked_on(self) -> int:
        """Bytes that GPTQ works on at a time."""
        return min(GPTQ_BYTES, 10 * self.count * self.columns * (self.columns + self.rows))

    def flops(self, gptq: bool) -> float:
        """Arithmetic to quantize them once."""
        products = self.tokens + self.columns + self.rows if gptq else 0.0
        return self.count * products * self.columns**2 + ROUNDING * self.weights


def quantize_demands(
    config: QuantizeConfig, sizes: Sizes, size: ModelSize, stored_after: int, calibration: CalibrationConfig
) -> list[Demand]:
    """The stages of a quantize step on a model of this size: gradients and costs where a budget asks, then writing."""
    shapes = {shape.layer: shape for shape in sizes.shapes}
    tokens = num_tokens(calibration) if config.method == "gptq" else 0
    matrices, extras = [], []
    for index in range(len(size.layers)):
        linears = [linear for linear in sizes.linears if linear.layer == index]
        matrices.append(list(_matrices(config, shapes.get(index), linears, num_tokens(calibration))))
        waiting = _waiting_bytes(size, size.layers[index], tokens, linears)
        extras.append(_apply_extra(config, matrices[-1]) + waiting)
    stages = []
    if config.has_budget:
        stages += [_gradient_demand(config, size, calibration)] if config.cost == "fisher" else []
        extra = max(_score_extra(config, shape, num_tokens(calibration)) for shape in sizes.shapes)
        flops = sum(_score_flops(config, found) for found in matrices)
        stages.append(score_demand(size, calibration, extra=extra, flops=flops))
    flops = sum(one.flops(config.method == "gptq") for found in matrices for one in found)
    written = replace(size, stored_bytes=stored_after)
    batch = batch_tokens(calibration)
    return [*stages, apply_demand(size, written, tokens, batch, extra=max(extras), flops=flops)]


def _matrices(
    config: QuantizeConfig, shape: ExpertShapes | None, linears: Sequence[LinearLayer], tokens: int
) -> Iterator[Matrices]:
    """What is quantized in one layer, when so many tokens pass it."""
    if shape is not None:
        each = tokens * shape.top_k / shape.num_experts
        for rows, columns in shape.projections.values():
            yield Matrices(shape.num_experts, rows, columns, each)
    for linear in linears:
        if linear.part in config.parts:
            yield Matrices(1, *linear.shape, tokens)


def _apply_extra(config: QuantizeConfig, matrices: Sequence[Matrices]) -> int:
    """Bytes beside the layer while its matrices are quantized: the largest of them at its worst moment.

    The float32 values, before and after, and the codes of those quantized together, and what is stored of all; experts
    stay in float32 after a method of bitsandbytes; with GPTQ second moments, what it works on, and passes that wait.
    """
    largest = max(matrices, key=lambda one: one.weights, default=Matrices(0, 0, 0, 0.0))
    values = min(
        2 * FLOAT * largest.weights + 2 * largest.weights,
        max(QUANTIZED_BYTES, 16 * largest.weights // max(1, largest.count)),
    )
    values += largest.weights
    if config.method in BITSANDBYTES:
        values += FLOAT * sum(one.weights for one in matrices if one.count > 1)
    if config.method != "gptq":
        return values
    return values + min(largest.moments, HESSIAN_BYTES) + largest.worked_on


def _waiting_bytes(size: ModelSize, layer: LayerSize, tokens: int, linears: Sequence[LinearLayer]) -> int:
    """Bytes of activations in passes that wait inside a layer for GPTQ.

    At most as many wait as `moments` allows, which counts all inputs and outputs of linear layers; a pass that has come
    to the experts keeps the residual stream, its norm, the experts' inputs and those of their down projections.
    """
    own = layer.top_k * layer.inner
    counted = FLOAT * tokens * (2 * size.hidden_size + sum(sum(linear.shape) for linear in linears) + own)
    waiting = min(1.0, HELD_BYTES / max(1, counted))
    return round(waiting * FLOAT * tokens * (3 * size.hidden_size + own))


def _score_extra(config: QuantizeConfig, shape: ExpertShapes, tokens: int) -> int:
    """Bytes beside a layer while its options are tried: kept inputs, then a chunk of experts."""
    width = next(columns for name, (_, columns) in shape.projections.items() if name != "down_proj")
    each = min(config.max_tokens_per_expert, tokens * shape.top_k / shape.num_experts)
    kept = FLOAT * each * shape.num_experts * width * (2 if config.allow_drop else 1)
    matrices = FLOAT * sum(3 * rows * columns + columns**2 for rows, columns in shape.projections.values())
    chunk = min(shape.num_experts, max(1, CHUNK_BYTES // matrices)) * matrices
    worked_on = max(Matrices(shape.num_experts, *sizes, 0.0).worked_on for sizes in shape.projections.values())
    return round(kept + chunk + worked_on)


def _score_flops(config: QuantizeConfig, matrices: Sequence[Matrices]) -> float:
    """Arithmetic to try every option once on every expert of a layer."""
    gptq = config.method == "gptq" and config.measured_by == "method"
    options = len({*config.options, SUPER_EXPERT_BITS})
    return options * sum(one.flops(gptq) for one in matrices if one.count > 1)


def _gradient_demand(config: QuantizeConfig, size: ModelSize, calibration: CalibrationConfig) -> Demand:
    """The sweep forward and back that `cost: fisher` needs: every expert's float32 copy lives until a batch is back."""
    samples = min(config.gradient_samples, calibration.num_samples)
    tokens = samples * calibration.sequence_length
    batch = min(samples, calibration.batch_size) * calibration.sequence_length
    worst = max(
        size.resident(layer) + FLOAT * sum(layer.experts) + 3 * size.activations(layer, batch) for layer in size.layers
    )
    return Demand(
        "gradients",
        host=0,
        computed=worst + 3 * hidden_bytes(size, tokens) + size.kept_tables(),
        scratch=len(size.layers) * hidden_bytes(size, tokens),
        moved=2 * size.stored_layers,
        flops=4 * size.flops_per_token * tokens,
    )
