"""What can be quantized in a model: the sizes of its experts, its other linear layers by part. Reads no weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from moe_compress.checkpoint.index import DTYPE_BITS
from moe_compress.compress.quantize.plan import ExpertShapes
from moe_compress.models.experts import matrix_shape, projections
from moe_compress.models.layers import MoELayer


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer outside the routed experts."""

    layer: int  # decoder layer
    path: str  # inside it
    part: str  # attention, shared_experts or dense_mlp
    shape: tuple[int, int]  # out, in


def expert_shapes(moe: MoELayer, stored_dtypes: Mapping[str, str], default: str = "BF16") -> ExpertShapes:
    """Sizes of one layer's experts; `stored_dtypes` gives a parameter's dtype on disk, as safetensors names it."""

    def nbytes(name: str) -> int:
        return DTYPE_BITS[stored_dtypes.get(f"{moe.block_name}.{name}", default)] // 8

    tensors = moe.expert_tensors()
    path = moe.experts_name.removeprefix(moe.block_name).lstrip(".")
    fused = {name: f"{path}.{name}".lstrip(".") for name in projections(moe.experts)}
    shapes: dict[str, tuple[int, int]] = {}
    for name, parts in projections(moe.experts).items():
        rows, columns = matrix_shape(moe.experts, tensors[fused[name]])
        shapes |= {part: (rows // len(parts), columns) for part in parts}

    def each(name: str, tensor: Tensor, dimension: int) -> int:
        return tensor.numel() // tensor.shape[dimension] * nbytes(name)

    biases = sum(each(name, tensor, 0) for name, tensor in tensors.items() if name not in fused.values())
    router = sum(each(name, tensor, dimension) for name, (tensor, dimension) in moe.router_tensors().items())
    return ExpertShapes(
        layer=moe.layer,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        projections=shapes,
        weight_bytes=nbytes(next(iter(fused.values()))),
        other_bytes=biases + router,
        bias_bytes=biases,
    )


def linear_layers(layers: Iterable[nn.Module], moe_layers: Mapping[int, MoELayer]) -> Iterator[LinearLayer]:
    """Every linear layer that may be quantized; routers and gates of shared experts may not."""
    for index, layer in enumerate(layers):
        moe = moe_layers.get(index)
        routers = {f"{moe.block_path}.{name}".rpartition(".")[0] for name in moe.router_tensors()} if moe else set()
        modules = dict(layer.named_modules())
        for path, module in modules.items():
            # A class of its own may do something else with its weight than a linear layer does.
            if type(module) is not nn.Linear or path in routers or module.out_features == 1:
                continue
            part = _part(path, modules, moe)
            if part is not None:
                yield LinearLayer(index, path, part, (module.out_features, module.in_features))


def _part(path: str, modules: Mapping[str, nn.Module], moe: MoELayer | None) -> str | None:
    """The part that a linear layer belongs to, None for what is none of them."""
    owners = [modules[".".join(path.split(".")[:length])] for length in range(1, path.count(".") + 1)]
    if moe is not None and path.startswith(f"{moe.block_path}."):
        return "shared_experts" if "shared" in path else None
    if any(hasattr(owner, "layer_idx") and "mlp" not in type(owner).__name__.lower() for owner in owners):
        return "attention"
    if any("mlp" in type(owner).__name__.lower() for owner in owners):
        return "shared_experts" if "shared" in path else "dense_mlp"
    return None
