"""Modules whose weights stay packed in memory and become numbers only while they are used."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from moe_compress.errors import UsageError
from moe_compress.models.experts import experts_forward, matrix_shape, projections
from moe_compress.runtime.scheme import Scheme, Shapes
from moe_compress.settings import parse_size

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


class PackedEmbedding(PackedWeight):
    """Embeddings with a packed table; only the rows that are looked up become numbers."""

    def __init__(self, scheme: Scheme, embedding: nn.Embedding, scale_dtype: torch.dtype) -> None:
        super().__init__(scheme, embedding.num_embeddings, embedding.embedding_dim, scale_dtype)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.dtype = embedding.padding_idx, embedding.weight.dtype

    @property
    def weight(self) -> Tensor:
        """The table in the model's dtype."""
        return self.dense(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] to [..., H]."""
        rows = ids.flatten()
        table = {name: buffer[rows] for name, buffer in self.named_buffers(recurse=False)}
        return self.scheme.dequantize(table, len(rows), self.width, self.dtype).reshape(*ids.shape, self.width)


class TiedHead(nn.Module):
    """An output head whose table is that of packed embeddings; it has no tensors of its own."""

    def __init__(self, embeddings: PackedEmbedding) -> None:
        super().__init__()
        self._shared = [embeddings]  # in a list, so that it is not registered a second time

    @property
    def weight(self) -> Tensor:
        """The table in the model's dtype."""
        return self._shared[0].weight

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., H] to [..., V]."""
        return F.linear(inputs, self._shared[0].dense(inputs.dtype))


def cache_bytes(value: object) -> int:
    """Bytes of `expert_cache_bytes`: 0 (no cache) or a size such as `1GB`; `UsageError` for anything else."""
    if value == 0 and not isinstance(value, bool):
        return 0
    try:
        return parse_size(value)
    except ValueError:
        raise UsageError(f"expert_cache_bytes should be 0 or a size such as `1GB`, got `{value}`.") from None


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


class PackedProjection(_AsStored):
    """One projection of all experts of a layer; matrices without a scheme stay as they are.

    Tensors of the same kind lie one behind the other in a single buffer, by expert: few buffers load much faster than
    many. A checkpoint holds them expert by expert (`packed_conversions`).
    """

    def __init__(self, schemes: Sequence[Scheme | None], height: int, width: int, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.schemes, self.height, self.width = schemes, height, width
        self.pieces: list[dict[str, tuple[int, tuple[int, ...]]]] = []  # by expert: name -> start, shape
        sizes: dict[str, int] = {}
        dtypes: dict[str, torch.dtype] = {}
        for scheme in schemes:
            tensors: Shapes = {"weight_plain": ((height, width), scale_dtype)}
            if scheme is not None:
                tensors = scheme.tensors(height, width, scale_dtype)
            piece: dict[str, tuple[int, tuple[int, ...]]] = {}
            for name, (shape, dtype) in tensors.items():
                piece[name] = (sizes.get(name, 0), shape)
                sizes[name] = sizes.get(name, 0) + math.prod(shape)
                dtypes[name] = dtype
            self.pieces.append(piece)
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size, dtype=dtypes[name]))

    def tensors(self, expert: int) -> dict[str, Tensor]:
        """What is stored of one expert's matrix, as views."""
        return {
            name: self.get_buffer(name)[start : start + math.prod(shape)].view(shape)
            for name, (start, shape) in self.pieces[expert].items()
        }

    def dense(self, expert: int, dtype: torch.dtype) -> Tensor:
        """The matrix [height, width] of one expert in `dtype`."""
        tensors, scheme = self.tensors(expert), self.schemes[expert]
        if scheme is None:
            return tensors["weight_plain"].to(dtype)
        return scheme.dequantize(tensors, self.height, self.width, dtype)


class PackedExperts(nn.Module):
    """Mixed into a family's experts class; its matrices are those of its children, one for each projection."""

    cache: ExpertCache | None
    num_experts: int

    def expert_weight(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        """Matrix [out, in] of one expert, under its name among the family's fused parameters."""

        def make() -> Tensor:
            owners: list[Any] = [self.get_submodule(part) for part in projections(self)[name]]
            parts = [owner.dense(expert, dtype) for owner in owners]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        if self.cache is None:
            return make()
        device = next(self.buffers()).device
        return self.cache.get((id(self), expert, name, dtype, device), make)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The gated sum of the routed experts' outputs, whatever experts implementation the configuration names."""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


def pack_experts(
    experts: Any, schemes: Mapping[str, Sequence[Scheme | None]], scale_dtype: torch.dtype, cache: ExpertCache | None
) -> None:
    """Exchange a fused experts module's matrices for packed ones; `schemes` gives each projection's, by expert."""
    shapes = {name: matrix_shape(experts, getattr(experts, name)) for name in projections(experts)}
    for name, (rows, columns) in shapes.items():
        del experts._parameters[name]
        parts = projections(experts)[name]
        for part in parts:
            experts.add_module(part, PackedProjection(schemes[part], rows // len(parts), columns, scale_dtype))
    experts.num_experts = len(next(iter(schemes.values())))
    experts.cache = cache
    base = type(experts)
    experts.__class__ = type(f"Packed{base.__name__}", (PackedExperts, base), {"__module__": __name__})


class _Join(ConversionOps):
    """Loading: the tensors of all experts, in their order, become one buffer."""

    def convert(self, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **_: Any) -> Any:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: torch.cat([tensor.flatten() for tensor in tensors])}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Part()


class _Part(ConversionOps):
    """Saving: a buffer becomes the tensors of each expert again."""

    def convert(self, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **settings: Any) -> Any:
        name = settings["full_layer_name"]
        path, _, kind = name.replace(".*.", ".").rpartition(".")
        projection = settings["model"].get_submodule(path)
        return {
            name.replace("*", str(expert)): projection.tensors(expert)[kind].clone()
            for expert, pieces in enumerate(projection.pieces)
            if kind in pieces
        }

    @property
    def reverse_op(self) -> ConversionOps:
        return _Join()


_SLOTS = [name for base in WeightConverter.__mro__ for name in getattr(base, "__slots__", ())]


class _PackedConverter(WeightConverter):
    """Of one kind of tensor of one projection; matches the numbers of experts alone.

    The loader copies a converter for every tensor of a checkpoint, and asks every one about every name, which took most
    of the time of loading one.
    """

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if not source_key.endswith(self.target_patterns[0].rpartition("experts")[2]):
            return source_key, None
        found: tuple[str, str | None] = super().rename_source_key(source_key)
        return found

    def reverse_transform(self) -> WeightConverter:
        (target,) = self._original_target_patterns
        saving = WeightConverter(target, target.replace("experts.", "experts.*.", 1), operations=[_Part()])
        saving.scope_prefix, saving.base_model_prefix = self.scope_prefix, self.base_model_prefix
        return saving

    def __deepcopy__(self, memo: Any) -> _PackedConverter:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        for name in _SLOTS:
            if hasattr(self, name):
                object.__setattr__(copied, name, getattr(self, name))
        copied.collected_tensors, copied.layer_targets = defaultdict(list), defaultdict(set)
        return copied


def packed_conversions() -> list[WeightConverter]:
    """The way from a checkpoint's tensors, expert by expert, to the buffers of `PackedProjection`, and back."""
    kinds = ("weight_packed", "weight_scale", "weight_zero_point", "weight_absmax", "weight_plain")
    return [
        _PackedConverter(rf"experts\.\d+\.{part}\.{kind}", f"experts.{part}.{kind}", operations=[_Join()])
        for part in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
        for kind in kinds
    ]
