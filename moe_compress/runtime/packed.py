"""Modules whose weights stay packed in memory and become numbers only while they are used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compress.models.experts import experts_forward, matrix_shape, projections
from moe_compress.runtime.scheme import Scheme

if TYPE_CHECKING:
    from typing_extensions import Self

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _AsStored(nn.Module):
    """Tensors that are stored in a dtype, and keep it whatever the model is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return fn(tensor)
            return fn(tensor.view(INTEGERS[tensor.element_size()])).view(tensor.dtype)  # which no cast touches

        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = moved(buffer)
        return self


class PackedWeight(_AsStored):
    """One matrix [height, width] in the tensors of its scheme; buffers, so that they load, save and move like any."""

    def __init__(self, scheme: Scheme, height: int, width: int, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme, self.height, self.width = scheme, height, width
        for name, (shape, dtype) in scheme.tensors(height, width, scale_dtype).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix in `dtype`, made anew."""
        return self.scheme.dequantize(dict(self.named_buffers(recurse=False)), self.height, self.width, dtype)


class PlainWeight(_AsStored):
    """One matrix that stays as it is, among packed ones."""

    def __init__(self, height: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight_plain", torch.zeros(height, width, dtype=dtype))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix in `dtype`."""
        return self.get_buffer("weight_plain").to(dtype)


class PackedLinear(PackedWeight):
    """A linear layer with a packed weight."""

    def __init__(self, scheme: Scheme, linear: nn.Linear, scale_dtype: torch.dtype) -> None:
        super().__init__(scheme, linear.out_features, linear.in_features, scale_dtype)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.dtype = linear.bias, linear.weight.dtype

    @property
    def weight(self) -> Tensor:
        """The matrix in the model's dtype, for models that look at it themselves."""
        return self.dense(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return super()._apply(fn, recurse)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return F.linear(inputs, self.dense(inputs.dtype), bias)


class ExpertCache:
    """The dequantized matrices that were used last, up to a number of bytes; shared by all layers of a model."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._held: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def get(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """The matrix kept under `key`, or the one that `make` gives."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        made = make()
        if made.nbytes <= self.limit:
            self.size += made.nbytes
            self._held[key] = made
            while self.size > self.limit:
                self.size -= self._held.popitem(last=False)[1].nbytes
        return made


class PackedExperts(nn.Module):
    """Mixed into a family's experts class; its matrices are the children `<expert>.<projection>`."""

    cache: ExpertCache | None
    num_experts: int

    def expert_weight(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        """Matrix [out, in] of one expert, under its name among the family's fused parameters."""

        def make() -> Tensor:
            owner = self.get_submodule(str(expert))
            parts = [getattr(owner, part).dense(dtype) for part in projections(self)[name]]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        if self.cache is None:
            return make()
        device = next(self.get_submodule(str(expert)).buffers()).device
        return self.cache.get((id(self), expert, name, dtype, device), make)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The gated sum of the routed experts' outputs, whatever experts implementation the configuration names."""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


def pack_experts(
    experts: Any, schemes: Mapping[str, list[Scheme | None]], scale_dtype: torch.dtype, cache: ExpertCache | None
) -> None:
    """Exchange a fused experts module's matrices for packed ones; `schemes` gives each projection's, by expert."""
    fused = {name: getattr(experts, name) for name in projections(experts)}
    experts.num_experts = len(next(iter(schemes.values())))
    for expert in range(experts.num_experts):
        owner = nn.Module()
        for name, parts in projections(experts).items():
            out, into = matrix_shape(experts, fused[name])
            for part in parts:
                scheme, height = schemes[part][expert], out // len(parts)
                owner.add_module(
                    part,
                    PlainWeight(height, into, scale_dtype)
                    if scheme is None
                    else PackedWeight(scheme, height, into, scale_dtype),
                )
        experts.add_module(str(expert), owner)
    for name in fused:
        del experts._parameters[name]
    experts.cache = cache
    base = type(experts)
    experts.__class__ = type(f"Packed{base.__name__}", (PackedExperts, base), {"__module__": __name__})
