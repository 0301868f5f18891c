"""Quantizing a checkpoint, layer by layer: the planned experts dropped, the others and chosen linear layers packed.

With `gptq` the calibration tokens pass through the layers that are already quantized; each layer is first run as it is,
to collect the second moments of the inputs of every matrix, and again when its matrices are quantized. Experts that
few tokens reached take a second moment that is partly pooled over the layer (`Hessians.finish`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.checkpoint.rewrite import Change, TableFormat, Tensors
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.prune.apply import with_counts
from moe_compress.compress.quantize.config import BITSANDBYTES
from moe_compress.compress.quantize.gptq import POOL_BELOW, Hessians, gptq
from moe_compress.compress.quantize.plan import KEEP, QuantizedLayer, QuantizePlan
from moe_compress.compress.quantize.rtn import rtn
from moe_compress.compress.quantize.shapes import LinearLayer
from moe_compress.compress.quantize.storage import (
    Packed,
    PluginStorage,
    StockStorage,
    embedding_tables,
    linear_scheme,
    scheme_of,
)
from moe_compress.models.experts import expert_weight, projections
from moe_compress.models.layers import MoELayer
from moe_compress.models.lockstep import Enough
from moe_compress.runtime import bnb
from moe_compress.runtime.pack import pack
from moe_compress.runtime.scheme import Scheme

HESSIAN_BYTES = 4 << 30  # of second moments held at a time


class QuantizeChange(Change):
    """Applies a plan; `tokens` are needed by gptq alone. What `notes` remembers survives an interruption."""

    def __init__(
        self,
        plan: QuantizePlan,
        linears: Sequence[LinearLayer],
        *,
        tier: str,
        scale_dtype: torch.dtype,
        tokens: Tensor | None,
        batch_size: int,
        notes: Path | None = None,
    ) -> None:
        self.plan, self.settings, self.scale_dtype = plan, plan.config, scale_dtype
        self.layers: dict[int, QuantizedLayer] = {layer.layer: layer for layer in plan.layers}
        self.linears = [linear for linear in linears if linear.part in plan.config.parts]
        self.storage = StockStorage(self) if tier == "stock" else PluginStorage(self)
        self.tokens = tokens if plan.config.method == "gptq" else None
        self.batch_size = batch_size
        self._notes = notes
        self._pooled: dict[str, list[int]] = {}  # layer -> experts as numbered in the source
        if notes is not None and notes.exists():
            self._pooled = json.loads(notes.read_text(encoding="utf-8"))

    @property
    def pooled(self) -> list[tuple[int, int]]:
        """(layer, expert as numbered in the source) of those that few tokens reached."""
        return sorted((int(layer), expert) for layer, experts in self._pooled.items() for expert in experts)

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        counts = {layer: len(found.keep) for layer, found in self.layers.items()}
        if self.plan.num_dropped:
            config = with_counts(config, self.plan.layers[0].num_experts, counts)
        return self.storage.config(config)

    def layer(self, moe: MoELayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        keep = self.layers[moe.layer].keep
        return state if len(keep) == moe.num_experts else moe.select(state, torch.tensor(keep))

    @torch.no_grad()
    def store(self, target: LayerStream, index: int, rehearse: Callable[[], None]) -> dict[str, Tensor]:
        packed, few = Packed(index), set[int]()
        linears = [linear for linear in self.linears if linear.layer == index]
        moe = target.moe_layers.get(index)
        moments = _Moments(target.layers[index], moe, linears) if self.tokens is not None else None
        if moments is not None:
            moments.collect_linears(rehearse)
        for linear in linears:
            self._quantize_linear(target.layers[index], linear, moments, packed)
        if moe is not None:
            for name in projections(moe.experts):
                few |= self._quantize_experts(moe, name, moments, rehearse, packed)
        self._pooled[str(index)] = sorted(few)
        if self._notes is not None:
            write_json(self._notes, self._pooled)
        return self.storage.tensors(target, packed)

    def tables(self, stream: LayerStream) -> dict[str, TableFormat]:
        return embedding_tables(stream, self.settings)

    def pack_table(self, name: str, table_VH: Tensor, stored: TableFormat) -> dict[str, Tensor]:
        assert stored.scheme.grid is not None
        steps = self.settings.scale_search
        found = rtn(table_VH, stored.scheme.grid, scale_dtype=stored.scale_dtype, search_steps=steps, what=f"`{name}`")
        tensors = pack(found)
        del tensors["weight_shape"]
        return tensors

    def packs(self, index: int) -> set[str]:
        return {f"{linear.path}.weight" for linear in self.linears if linear.layer == index}

    def expected(self, target: LayerStream, index: int) -> Tensors:
        return self.storage.expected(target, index)

    def linear_scheme(self, linear: LinearLayer) -> Scheme:
        """How a linear layer outside the experts is stored."""
        return linear_scheme(self.settings, self.settings.parts[linear.part])

    def _quantize_linear(self, layer: nn.Module, linear: LinearLayer, moments: _Moments | None, packed: Packed) -> None:
        module: Any = layer.get_submodule(linear.path)
        scheme = self.linear_scheme(linear)
        hessian = moments.linear(linear.path) if moments is not None else None
        what = f"`{linear.path}.weight` of layer {linear.layer}"
        stored, values = self._quantize(module.weight[None], hessian, scheme, what)
        packed.linears[linear.path] = (scheme, stored[0])
        module.weight.data.copy_(values[0])

    def _quantize_experts(
        self,
        moe: MoELayer,
        name: str,
        moments: _Moments | None,
        rehearse: Callable[[], None],
        packed: Packed,
    ) -> set[int]:
        """One fused matrix of all experts: those with the same scheme together, as many as memory allows.

        Returns the experts whose second moments were pooled, as numbered in the source.
        """
        planned, pooled = self.layers[moe.layer], set[int]()
        fused, stored_dtype = getattr(moe.experts, name), getattr(moe.experts, name).dtype
        if self.settings.method in BITSANDBYTES:  # whose values are not those of the stored type
            fused.data = fused.data.float()
        for part, rows in _row_ranges(moe, name):
            options = planned.options[part]
            for option in dict.fromkeys(options):
                members = [expert for expert, chosen in enumerate(options) if chosen == option]
                if option == KEEP:
                    for expert in members:
                        packed.experts[expert, part] = (
                            None,
                            expert_weight(moe.experts, name, expert, stored_dtype)[rows],
                        )
                    continue
                scheme = scheme_of(option, self.settings)
                for chunk in _chunks(members, moe, name) if moments is not None else [members]:
                    weights = torch.stack([expert_weight(moe.experts, name, e, torch.float32)[rows] for e in chunk])
                    hessian = None
                    if moments is not None:
                        hessian, few = moments.experts(name, chunk, rehearse)
                        pooled |= {planned.keep[expert] for expert in few}
                    what = f"`{part}` of an expert in layer {moe.layer}"
                    stored, values = self._quantize(weights, hessian, scheme, what)
                    for expert, tensors, value in zip(chunk, stored, values, strict=True):
                        packed.experts[expert, part] = (scheme, tensors)
                        view = fused.data[expert].T if moe.experts.is_transposed else fused.data[expert]
                        view[rows].copy_(value)
        return pooled

    def _quantize(
        self, weights: Tensor, hessian: Tensor | None, scheme: Scheme, what: str
    ) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """What is stored of matrices [E, O, I], and the values it stands for."""
        settings = self.settings
        if scheme.grid is None:
            stored = [bnb.quantize(weight.float(), scheme.format or "nf4", what=what) for weight in weights]
        elif hessian is None:
            found = rtn(
                weights.float(),
                scheme.grid,
                scale_dtype=self.scale_dtype,
                search_steps=settings.scale_search,
                what=what,
            )
            stored = self.storage.pack(found)
        else:
            result = gptq(
                weights.float(),
                hessian,
                scheme.grid,
                scale_dtype=self.scale_dtype,
                search_steps=settings.scale_search,
                act_order=settings.act_order,
                damping=settings.damping,
                what=what,
            )
            stored = self.storage.pack(result.quantized)
        height, width = weights.shape[1:]
        return stored, [scheme.dequantize(tensors, height, width, torch.float32) for tensors in stored]


class _Moments:
    """Second moments of the inputs of one layer's matrices, from rehearsals of the layer."""

    def __init__(self, layer: nn.Module, moe: MoELayer | None, linears: Sequence[LinearLayer]) -> None:
        self.moe = moe
        self._layer = layer
        self._widths = {linear.path: linear.shape[1] for linear in linears}
        self._same: dict[str, str] = {}  # linear layer -> the one before it that has the same inputs, or itself
        self._linears: dict[str, Tensor] = {}
        self._experts: dict[str, tuple[list[int], Tensor, list[int]]] = {}

    def collect_linears(self, rehearse: Callable[[], None]) -> None:
        """Run the layer once for the linear layers outside the experts, up to the experts if they all come before."""
        if not self._widths:
            return
        sums: dict[str, Hessians] = {}
        handles = []
        latest: tuple[str, Tensor] | None = None

        def see(path: str, module: nn.Module, arguments: Any) -> None:
            nonlocal latest
            inputs = arguments[0]
            if path not in self._same:
                shared = latest is not None and latest[1] is inputs
                self._same[path] = self._same[latest[0]] if latest is not None and shared else path
                if not shared:
                    sums[path] = Hessians(1, self._widths[path], inputs.device)
            latest = path, inputs
            if path in sums:
                sums[path].add(0, inputs.flatten(0, -2))

        for path in self._widths:
            handles.append(self._layer.get_submodule(path).register_forward_pre_hook(partial(see, path)))
        if self.moe is not None:
            all_before: bool | None = None  # as the first batch finds it

            def enter(module: nn.Module, inputs: Any) -> None:
                nonlocal all_before
                if all_before is None:
                    all_before = len(self._same) == len(self._widths)
                if all_before:
                    raise Enough

            handles.append(self.moe.experts.register_forward_pre_hook(enter))
        rehearse()
        for handle in handles:
            handle.remove()
        for path in self._widths.keys() - self._same.keys():  # a layer that did not run is rounded
            self._same[path], sums[path] = path, Hessians(1, self._widths[path])
        self._linears = {path: hessians.finish(1)[0] for path, hessians in sums.items()}

    def linear(self, path: str) -> Tensor:
        """[1, I, I] of one linear layer."""
        return self._linears[self._same[path]]

    def experts(self, name: str, members: list[int], rehearse: Callable[[], None]) -> tuple[Tensor, list[int]]:
        """[len(members), I, I] of these experts' inputs of a fused matrix, and the experts whose moment was pooled."""
        held = self._experts.get(name)
        if held is None or not set(members) <= set(held[0]):
            self._collect(name, members, rehearse)
        numbers, moments, few = self._experts[name]
        return moments[[numbers.index(expert) for expert in members]], [e for e in members if e in few]

    def _collect(self, name: str, members: list[int], rehearse: Callable[[], None]) -> None:
        assert self.moe is not None
        experts: Any = self.moe.experts
        self._experts.clear()
        fused = {other: getattr(experts, other) for other in projections(experts)}
        widths = {other: expert_weight(experts, other, 0, tensor.dtype).shape[1] for other, tensor in fused.items()}
        all_experts = list(range(self.moe.num_experts))
        if sum(4 * len(all_experts) * width**2 for width in widths.values()) <= HESSIAN_BYTES:
            wanted, members = list(widths), all_experts  # one rehearsal serves every matrix of the layer
        else:
            wanted = [name]
        sums = {other: Hessians(len(members), widths[other], fused[other].device) for other in wanted}
        position = {expert: number for number, expert in enumerate(members)}

        def see(expert: int, hidden_NH: Tensor, inner_NF: Tensor) -> bool:
            if expert in position:
                for other, hessians in sums.items():
                    hessians.add(position[expert], inner_NF if other == "down_proj" else hidden_NH)
            return True

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            raise Enough

        experts.recorder = see
        handle = experts.register_forward_hook(leave)
        rehearse()
        handle.remove()
        del experts.recorder
        for other, hessians in sums.items():
            moments, few = hessians.finish(POOL_BELOW)
            self._experts[other] = (members, moments, [members[number] for number in few])


def _row_ranges(moe: MoELayer, name: str) -> Iterator[tuple[str, slice]]:
    """The projections inside a fused matrix, and their rows."""
    parts = projections(moe.experts)[name]
    rows = expert_weight(moe.experts, name, 0, torch.float32).shape[0] // len(parts)
    for number, part in enumerate(parts):
        yield part, slice(number * rows, (number + 1) * rows)


def _chunks(members: list[int], moe: MoELayer, name: str) -> Iterator[list[int]]:
    """Experts whose second moments fit into memory together."""
    width = expert_weight(moe.experts, name, 0, torch.float32).shape[1]
    count = max(1, HESSIAN_BYTES // (4 * width**2))
    for start in range(0, len(members), count):
        yield members[start : start + count]
