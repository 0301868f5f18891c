"""What it costs to quantize one expert, measured on its own tokens: every expert alone, every width, every projection.

The costs land in the scores as `<kind>.<part>.<option>`, each [E]. The part is a projection, or `expert` for all of
them. The kinds are sums over an expert's tokens, of the change d = g (f - f_b), f the expert's raw output, f_b the
output with b bits, as the step's own method quantizes it (or rounded to nearest, `measured_by: rtn`), g the value that
multiplies it, and h the residual stream that leaves the layer:

* `error`: |d|^2.
* `relative_error`: |d|^2 / |h|^2. What follows sees the stream through its norm, and a few tokens (attention sinks)
  have streams so large that their errors, which matter little, would outweigh all others.
* `relative_fisher`, with channel weights F: the sum over channels c of F_c d_c^2 / |h|^2.

For the option `drop` the change is y - y_without, y the block's routed output, y_without the same when the router has
lost the expert: other experts take its place, with the gate values that the model gives them.

At most `max_tokens_per_expert` tokens of an expert are kept, those seen first; its sums are scaled up to all of them.
Not covered: what the loss of an expert changes for tokens that were not routed to it (where gates are shares of all).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from moe_compress.compress.quantize.config import QuantizeConfig
from moe_compress.compress.quantize.gptq import POOL_BELOW, Hessians, gptq
from moe_compress.compress.quantize.plan import DROP, SUPER_EXPERT_BITS, WHOLE, require_equal_groups
from moe_compress.compress.quantize.rtn import rtn
from moe_compress.errors import UnsupportedModelError
from moe_compress.models.experts import expert_inner, expert_output, expert_weight, matrix_shape, projections
from moe_compress.models.layers import MoELayer, find_moe_layers, require_no_banks, routing_groups
from moe_compress.models.reduced import ReducedBlocks, lending
from moe_compress.models.skeleton import build_skeleton
from moe_compress.runtime.grid import Grid

Array = NDArray[np.float64]
TINY = float(np.finfo(np.float64).tiny)
CHUNK_BYTES = 1 << 30  # of matrices and second moments held at a time


class Sensitivity:
    """Collects the inputs of one layer's experts during the sweep, then measures every option on them."""

    def __init__(
        self,
        config: QuantizeConfig,
        moe: MoELayer,
        scale_dtype: torch.dtype,
        *,
        routers: ReducedRouters | None = None,
        channel_weights: Tensor | None = None,
    ) -> None:
        self.config, self.moe, self.scale_dtype = config, moe, scale_dtype
        self.routers, self.channel_weights = routers, channel_weights
        self.kept: list[list[list[Tensor]]] = [[] for _ in range(moe.num_experts)]
        self.seen = [0] * moe.num_experts

    def add(self, expert: int, input_NH: Tensor, block_input_NH: Tensor, gate_N: Tensor, leaving_N: Tensor) -> None:
        """Keep what came to an expert, as far as there is room."""
        room = max(0, self.config.max_tokens_per_expert - self.seen[expert])
        if room:
            block_NH = block_input_NH[: room if self.routers is not None else 0]
            kept = (input_NH[:room], block_NH, gate_N[:room], leaving_N[:room])
            self.kept[expert].append([tensor.clone() for tensor in kept])
        self.seen[expert] += len(gate_N)

    @torch.no_grad()
    def measure(self) -> dict[str, Array]:
        """The costs by name, each float64 [E]."""
        experts = self.moe.experts
        parts = [WHOLE] + (self._parts() if self.config.granularity == "projection" else [])
        options = sorted({*self.config.options, SUPER_EXPERT_BITS})
        names = [f"{part}.{bits}" for part in parts for bits in options]
        names += [f"{WHOLE}.{DROP}"] if self.routers is not None else []
        kinds = ["error", "relative_error"] + (["relative_fisher"] if self.channel_weights is not None else [])
        costs = {f"{kind}.{name}": np.zeros(self.moe.num_experts) for kind in kinds for name in names}
        for chunk in self._chunks():
            inputs = {expert: [torch.cat(found) for found in zip(*self.kept[expert], strict=True)] for expert in chunk}
            exact, moments = self._exact({expert: tensors[0] for expert, tensors in inputs.items()})
            for bits in options:
                rounded = self._rounded(chunk, bits, moments)
                for number, expert in enumerate(chunk):
                    input_NH, _, gate_N, leaving_N = inputs[expert]
                    own = {name: matrices[number] for name, matrices in rounded.items()}
                    for part in parts:
                        one = _Rounded(experts, own, part)
                        output_NH = expert_output(one, expert, expert_inner(one, expert, input_NH))
                        change_NH = self.moe.output_scale * gate_N[:, None] * (output_NH - exact[expert])
                        self._enter(costs, f"{part}.{bits}", expert, change_NH, leaving_N)
            if self.routers is not None:
                for expert in chunk:
                    _, block_NH, _, leaving_N = inputs[expert]
                    change_NH = self.routers.change(self.moe, expert, block_NH)
                    self._enter(costs, f"{WHOLE}.{DROP}", expert, change_NH, leaving_N)
        return costs

    def _chunks(self) -> Iterator[list[int]]:
        """Experts that were seen, as many together as memory allows."""
        seen = [expert for expert, kept in enumerate(self.kept) if kept]
        shapes = [matrix_shape(self.moe.experts, getattr(self.moe.experts, name)) for name in self._names()]
        each = 4 * sum(3 * rows * columns + columns**2 for rows, columns in shapes)
        count = max(1, CHUNK_BYTES // each)
        for start in range(0, len(seen), count):
            yield seen[start : start + count]

    def _exact(self, inputs: dict[int, Tensor]) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """The experts' raw outputs, and the second moments of the inputs of their matrices (none without gptq)."""
        experts: Any = self.moe.experts
        device = next(iter(inputs.values())).device
        rounding = self.config.method != "gptq" or self.config.measured_by == "rtn"
        names = [] if rounding else self._names()
        widths = {name: matrix_shape(experts, getattr(experts, name))[1] for name in names}
        sums = {name: Hessians(len(inputs), width, device) for name, width in widths.items()}
        exact: dict[int, Tensor] = {}
        for number, (expert, input_NH) in enumerate(inputs.items()):
            inner_NF = expert_inner(experts, expert, input_NH)
            for name, hessians in sums.items():
                hessians.add(number, inner_NF if name == "down_proj" else input_NH)
            exact[expert] = expert_output(experts, expert, inner_NF)
        return exact, {name: hessians.finish(POOL_BELOW)[0] for name, hessians in sums.items()}

    def _names(self) -> list[str]:
        return list(projections(self.moe.experts))

    def _parts(self) -> list[str]:
        return [part for parts in projections(self.moe.experts).values() for part in parts]

    def _rounded(self, chunk: list[int], bits: int, moments: dict[str, Tensor]) -> dict[str, Tensor]:
        """The fused matrices [len(chunk), out, in] of these experts as `bits` leave them."""
        config, rounded = self.config, {}
        grid = Grid(bits, config.weights_per_scale, config.symmetric or bits == 1)
        for name in self._names():
            weights = torch.stack([expert_weight(self.moe.experts, name, e, torch.float32) for e in chunk])
            what = f"`{self.moe.experts_name}.{name}`"
            settings: dict[str, Any] = {
                "scale_dtype": self.scale_dtype,
                "search_steps": config.scale_search,
                "what": what,
            }
            if name in moments:
                settings |= {"act_order": config.act_order, "damping": config.damping}
                rounded[name] = gptq(weights, moments[name], grid, **settings).quantized.dequantize()
            else:
                rounded[name] = rtn(weights, grid, **settings).dequantize()
        return rounded

    def _enter(self, costs: dict[str, Array], name: str, expert: int, change_NH: Tensor, leaving_N: Tensor) -> None:
        squares_NH = change_NH.double().square()
        relative_NH = squares_NH / leaving_N.double().square().clamp(min=TINY)[:, None]
        scale = self.seen[expert] / len(change_NH)
        costs[f"error.{name}"][expert] = float(squares_NH.sum()) * scale
        costs[f"relative_error.{name}"][expert] = float(relative_NH.sum()) * scale
        if self.channel_weights is not None:
            costs[f"relative_fisher.{name}"][expert] = float((relative_NH.cpu() * self.channel_weights).sum()) * scale


class _Rounded:
    """An experts module with the rounded matrices of one expert, all of them or one projection's rows."""

    def __init__(self, experts: Any, rounded: dict[str, Tensor], part: str) -> None:
        self._experts, self._rounded, self._part = experts, rounded, part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def expert_weight(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        parts = projections(self._experts)[name]
        if self._part == WHOLE or parts == (self._part,):
            return self._rounded[name]
        exact = expert_weight(self._experts, name, expert, dtype)
        pieces = zip(parts, self._rounded[name].chunk(len(parts)), exact.chunk(len(parts)), strict=True)
        return torch.cat([new if part == self._part else old for part, new, old in pieces])


def require_droppable(config: PretrainedConfig) -> None:
    """Raise what keeps experts of this model from being dropped one by one: `UsageError`, `UnsupportedModelError`."""
    require_no_banks(config, "allow_drop")
    require_equal_groups(routing_groups(config))
    for moe in find_moe_layers(build_skeleton(config)):
        if not moe.block_path:
            raise UnsupportedModelError(f"allow_drop: the router of `{moe.block_name}` cannot be run by itself.")


class ReducedRouters:
    """What the routed output of MoE blocks becomes when their router loses an expert."""

    def __init__(self, config: PretrainedConfig) -> None:
        require_droppable(config)
        self._blocks = ReducedBlocks(config)

    def change(self, moe: MoELayer, expert: int, block_input_NH: Tensor) -> Tensor:
        """Routed output of the block [N, H] without `expert` less that with it, for the same inputs [N, H]."""
        reduced, numbers = self._blocks.borrow(moe, expert)
        own, found = torch.arange(moe.num_experts + 1), list[Tensor]()
        with lending(reduced.experts, moe.experts, numbers, found):
            reduced.block(block_input_NH[None])
        with lending(moe.experts, moe.experts, own, found):
            moe.block(block_input_NH[None])
        without, whole = found
        return moe.output_scale * (without - whole)
