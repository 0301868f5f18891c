"""Quantizing a checkpoint, layer by layer: the planned experts dropped, the others and chosen linear layers packed.

With `gptq` the calibration tokens pass through what is already quantized (`moments`). Experts that few tokens reached
take a second moment that is partly pooled over the layer (`Hessians.finish`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_compress.checkpoint.rewrite import Change, TableFormat, Tensors
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.prune.apply import with_counts
from moe_compress.compress.quantize.config import BITSANDBYTES
from moe_compress.compress.quantize.gptq import gptq
from moe_compress.compress.quantize.moments import Moments, chunks
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
from moe_compress.models.experts import projections
from moe_compress.models.layers import MoELayer
from moe_compress.models.lockstep import Lockstep
from moe_compress.runtime import bnb
from moe_compress.runtime.pack import pack
from moe_compress.runtime.scheme import Scheme

QUANTIZED_BYTES = 1 << 28  # of experts that are quantized together: weights, values, codes and what is stored of them
BYTES_PER_WEIGHT = 16


class QuantizeChange(Change):
    """Applies a plan; `tokens` are needed by gptq alone. What `notes` remembers survives an interruption.

    `moments` is the folder of second moments of experts that several layers use.
    """

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
        moments: Path | None = None,
    ) -> None:
        self.plan, self.settings, self.scale_dtype = plan, plan.config, scale_dtype
        self.layers: dict[int, QuantizedLayer] = {layer.layer: layer for layer in plan.layers}
        self.linears = [linear for linear in linears if linear.part in plan.config.parts]
        self.storage = StockStorage(self) if tier == "stock" else PluginStorage(self)
        self.tokens = tokens if plan.config.method == "gptq" else None
        self.batch_size = batch_size
        self._notes, self._moments = notes, moments
        self._shared: dict[int, dict[str, Tensor]] = {}  # by layer that stores them: quantized experts' values
        self._pooled: dict[str, list[int]] = {}  # layer -> experts as numbered in the source
        if notes is not None and notes.exists():
            self._pooled = json.loads(notes.read_text(encoding="utf-8"))

    @property
    def pooled(self) -> list[tuple[int, int]]:
        """(layer, expert as numbered in the source) of those that few tokens reached."""
        return sorted((int(layer), expert) for layer, experts in self._pooled.items() for expert in experts)

    def prepare(self, stream: LayerStream) -> None:
        self.storage.prepare(stream)

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        counts = {layer: len(found.keep) for layer, found in self.layers.items()}
        if self.plan.num_dropped:
            config = with_counts(config, self.plan.layers[0].num_experts, counts)
        return self.storage.config(config)

    def layer(self, moe: MoELayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if moe.layer not in self.layers:  # its experts are another layer's
            return state
        keep = self.layers[moe.layer].keep
        return state if len(keep) == moe.num_experts else moe.select(state, torch.tensor(keep))

    @torch.no_grad()
    def store(self, target: LayerStream, index: int, run: Lockstep) -> dict[str, Tensor]:
        packed, few = Packed(index), set[int]()
        layer, moe = target.layers[index], target.moe_layers.get(index)
        if index in target.owners:
            self._use_shared(target, index)
            moe = None
        linears = [linear for linear in self.linears if linear.layer == index]
        moments = None
        order: list[list[LinearLayer] | None] = [*([linear] for linear in linears), *([] if moe is None else [None])]
        if order and self.tokens is not None:
            shared = self._moments if index in target.owners.values() else None
            moments = Moments(run, index, layer, moe, linears, shared)
            order = moments.order()
        for group in order:
            if group is not None:
                self._quantize_linears(layer, group, moments, packed)
                continue
            assert moe is not None
            for name in projections(moe.experts):
                few |= self._quantize_experts(moe, name, moments, packed)
        if moments is not None:
            moments.close()
        if moe is not None and index in target.owners.values():
            self._keep_shared(moe)
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

    def _keep_shared(self, moe: MoELayer) -> None:
        """Keep the values of a bank for the layers that use it later, over an interruption too."""
        self._shared[moe.layer] = {name: getattr(moe.experts, name).data for name in projections(moe.experts)}
        if self._notes is not None:
            save_file({k: v.cpu() for k, v in self._shared[moe.layer].items()}, self._shared_file(moe.layer))

    def _use_shared(self, target: LayerStream, index: int) -> None:
        """Let a layer run the quantized experts of the layer that stores them."""
        owner, experts = target.owners[index], target.moe_layers[index].experts
        if owner not in self._shared:
            self._shared[owner] = load_file(self._shared_file(owner), device=str(target.device))
        for name, values in self._shared[owner].items():
            getattr(experts, name).data = values
        if index == max(layer for layer, stored_by in target.owners.items() if stored_by == owner):
            del self._shared[owner]

    def _shared_file(self, layer: int) -> Path:
        assert self._notes is not None, "an interruption is survived with notes"
        return self._notes.with_name(f"shared-{layer:05d}.safetensors")

    def _quantize_linears(
        self, layer: nn.Module, linears: list[LinearLayer], moments: Moments | None, packed: Packed
    ) -> None:
        """Linear layers with the same inputs: those with the same scheme together."""
        hessian = moments.linear(linears[0]) if moments is not None else None
        schemes = {linear.path: self.linear_scheme(linear) for linear in linears}
        for scheme in dict.fromkeys(schemes.values()):
            members = [linear for linear in linears if schemes[linear.path] == scheme]
            modules: list[Any] = [layer.get_submodule(linear.path) for linear in members]
            weights = torch.cat([module.weight for module in modules])[None]
            what = " and ".join(f"`{linear.path}.weight`" for linear in members) + f" of layer {members[0].layer}"
            found = self._quantize(weights, hessian, scheme, what, [linear.shape[0] for linear in members])
            for linear, module, (stored, values) in zip(members, modules, found, strict=True):
                packed.linears[linear.path] = (scheme, stored[0])
                module.weight.data.copy_(values[0])

    def _quantize_experts(self, moe: MoELayer, name: str, moments: Moments | None, packed: Packed) -> set[int]:
        """One fused matrix of all experts: those with the same schemes together, as many as memory allows.

        Returns the experts whose second moments were pooled, as numbered in the source.
        """
        planned, pooled = self.layers[moe.layer], set[int]()
        fused = getattr(moe.experts, name)
        if self.settings.method in BITSANDBYTES:  # whose values are not those of the stored type
            fused.data = fused.data.float()
        matrix_EOI = fused.data.transpose(1, 2) if moe.experts.is_transposed else fused.data
        parts = projections(moe.experts)[name]
        options = list(zip(*(planned.options[part] for part in parts), strict=True))
        together = max(1, QUANTIZED_BYTES // (BYTES_PER_WEIGHT * matrix_EOI[0].numel()))
        for chosen in dict.fromkeys(options):
            members = [expert for expert, found in enumerate(options) if found == chosen]
            for chunk in chunks(members, matrix_EOI.shape[2]) if moments is not None else [members]:
                hessian = None
                if moments is not None and set(chosen) != {KEEP}:
                    hessian, few = moments.experts(name, chunk)
                    pooled |= {planned.keep[expert] for expert in few}
                for start in range(0, len(chunk), together):
                    some = slice(start, start + together)
                    self._quantize_chunk(
                        moe.layer,
                        matrix_EOI,
                        chunk[some],
                        dict(zip(parts, chosen, strict=True)),
                        None if hessian is None else hessian[some],
                        packed,
                    )
        return pooled

    def _quantize_chunk(
        self,
        layer: int,
        matrix_EOI: Tensor,
        experts: list[int],
        chosen: dict[str, str],
        hessian: Tensor | None,
        packed: Packed,
    ) -> None:
        """Some experts of one fused matrix, each of whose parts has the same option in all of them."""
        height = matrix_EOI.shape[1] // len(chosen)
        rows = {part: slice(number * height, (number + 1) * height) for number, part in enumerate(chosen)}
        weights_EOI = matrix_EOI if len(experts) == len(matrix_EOI) else matrix_EOI[experts]
        for option in dict.fromkeys(chosen.values()):
            own = [part for part, found in chosen.items() if found == option]
            if option == KEEP:
                for expert in experts:
                    packed.experts |= {(expert, part): (None, matrix_EOI[expert, rows[part]]) for part in own}
                continue
            scheme = scheme_of(option, self.settings)
            what = f"`{own[0]}` of an expert in layer {layer}"
            part_EOI = weights_EOI if own == list(chosen) else weights_EOI[:, rows[own[0]]]
            found = self._quantize(part_EOI, hessian, scheme, what, [height] * len(own))
            for part, (stored, values) in zip(own, found, strict=True):
                for expert, tensors, value in zip(experts, stored, values, strict=True):
                    packed.experts[expert, part] = (scheme, tensors)
                    matrix_EOI[expert, rows[part]].copy_(value)

    def _quantize(
        self, weights_EOI: Tensor, hessian: Tensor | None, scheme: Scheme, what: str, heights: list[int]
    ) -> list[tuple[list[dict[str, Tensor]], Tensor]]:
        """Matrices of so many rows, one below the other: of each, what is stored [E] and the values it stands for."""
        settings = self.settings
        if scheme.grid is None:
            return [self._bitsandbytes(part_EOI, scheme, what) for part_EOI in weights_EOI.split(heights, dim=1)]
        common: dict[str, Any] = {
            "scale_dtype": self.scale_dtype,
            "search_steps": settings.scale_search,
            "what": what,
        }
        if hessian is None:
            found = rtn(weights_EOI, scheme.grid, **common)
        else:
            common |= {"act_order": settings.act_order, "damping": settings.damping}
            found = gptq(weights_EOI, hessian, scheme.grid, **common).quantized
        return [(self.storage.pack(part), part.dequantize(self.scale_dtype)) for part in found.split(heights)]

    def _bitsandbytes(self, weights_EOI: Tensor, scheme: Scheme, what: str) -> tuple[list[dict[str, Tensor]], Tensor]:
        stored = [bnb.quantize(weight.float(), scheme.format or "nf4", what=what) for weight in weights_EOI]
        _, height, width = weights_EOI.shape
        values = [scheme.dequantize(tensors, height, width, torch.float32) for tensors in stored]
        return stored, torch.stack(values)
