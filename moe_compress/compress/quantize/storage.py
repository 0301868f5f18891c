"""How quantized layers are laid out on disk, in the two tiers.

`stock`: one `compressed-tensors` scheme (pack-quantized, symmetric) for all routed experts, under the Hub's own names,
so that plain transformers, vLLM and the like load it. Plain transformers applies one scheme to all experts and ignores
their zero points, so nothing else may be written there: it would be loaded, and be wrong.
`plugin`: every matrix with a scheme of its own, under the names of the packed modules of `runtime`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_compress.checkpoint.rewrite import TableFormat, Tensors, described
from moe_compress.checkpoint.stream import TORCH_DTYPES, LayerStream
from moe_compress.checkpoint.writer import SAFETENSORS_DTYPES
from moe_compress.compress.quantize.config import BITSANDBYTES, PartConfig, QuantizeConfig
from moe_compress.compress.quantize.plan import KEEP, SHAPE_BYTES, QuantizePlan
from moe_compress.compress.quantize.shapes import LinearLayer, linear_layers
from moe_compress.errors import UnsupportedModelError
from moe_compress.models.experts import matrix_shape, projections
from moe_compress.models.layers import PACKED, SECTION, MoELayer
from moe_compress.runtime.families import plugin_config, plugin_section
from moe_compress.runtime.grid import Grid, Quantized
from moe_compress.runtime.pack import pack
from moe_compress.runtime.scheme import Scheme

if TYPE_CHECKING:
    from moe_compress.compress.quantize.apply import QuantizeChange

Stored = dict[str, Tensor]
_DIGIT = r"\d"


@dataclass
class Packed:
    """What became of one layer's matrices: the scheme and its tensors, or no scheme and the matrix itself."""

    layer: int
    experts: dict[tuple[int, str], tuple[Scheme | None, Any]] = field(default_factory=dict)  # (expert, projection)
    linears: dict[str, tuple[Scheme, Stored]] = field(default_factory=dict)  # path inside the layer


def scheme_of(option: str, config: QuantizeConfig) -> Scheme:
    """The scheme that an option's name stands for."""
    if option in BITSANDBYTES:
        return Scheme.from_json({"format": option})
    bits = int(option)
    return Scheme(Grid(bits, config.weights_per_scale, config.symmetric or bits == 1))


def linear_scheme(config: QuantizeConfig, part: PartConfig) -> Scheme:
    """How the linear layers of a part outside the experts are stored."""
    if config.method in BITSANDBYTES:
        return scheme_of(config.method, config)
    bits = part.bits or config.bits
    size = config.group_size if part.group_size in (None, "auto") else part.group_size
    return scheme_of(str(bits), config.model_copy(update={"group_size": size}))


def embedding_scheme(config: QuantizeConfig) -> Scheme:
    """How embeddings and the head are stored: symmetric, so that a row is read by itself."""
    assert config.embeddings is not None
    size = config.embeddings.group_size
    size = config.group_size if size in (None, "auto") else size
    bits = config.embeddings.bits or config.bits
    assert bits is not None, "the settings see to it"
    return Scheme(Grid(bits, None if size == "channel" else int(size or 0), True))


def embedding_tables(stream: LayerStream, config: QuantizeConfig) -> dict[str, TableFormat]:
    """The stored tables that a step packs. Raises `UnsupportedModelError` for embeddings that do more than look up."""
    if config.embeddings is None:
        return {}
    scheme, tables = embedding_scheme(config), {}
    scale_dtype = scale_dtype_of(stream)
    paths = {module: path for path, module in stream.model.named_modules()}
    tied = stream.model.config.get_text_config().tie_word_embeddings
    for module, names in stream.end_names.items():
        if tied and module is stream.model.get_output_embeddings():
            continue  # a second copy of the same table, which nothing reads
        if type(module) not in (nn.Embedding, nn.Linear) or len(names) > 1:
            raise UnsupportedModelError(
                f"embeddings of the class {type(module).__name__} cannot be packed; leave out `embeddings`."
            )
        for name in names:
            tables[name] = TableFormat(paths[module], scheme, scale_dtype)
    return tables


def linear_savings(config: QuantizeConfig, linears: Iterable[LinearLayer], scale_dtype: torch.dtype) -> int:
    """Bytes saved by quantizing linear layers outside the experts, all stored in `scale_dtype` before."""
    saved = 0
    for linear in linears:
        part = config.parts.get(linear.part)
        if part is not None:
            before = linear.shape[0] * linear.shape[1] * scale_dtype.itemsize
            saved += before - linear_scheme(config, part).stored_bytes(*linear.shape, scale_dtype)
    return saved


def scale_dtype_of(stream: LayerStream) -> torch.dtype:
    """The type scales are stored in: that of the experts' own weights."""
    moe = next(iter(stream.moe_layers.values()))
    name = next(name for name in moe.expert_tensors() if name.endswith("down_proj"))
    return TORCH_DTYPES[stream.stored_dtypes[f"{moe.block_name}.{name}"]]


def _slices(found: Quantized) -> list[Stored]:
    """`pack` for each matrix of a stack [E, O, I]."""
    tensors = pack(found)
    shape = tensors.pop("weight_shape")
    return [
        {name: tensor[number] for name, tensor in tensors.items()} | {"weight_shape": shape}
        for number in range(len(found.codes))
    ]


def noted_bytes(plan: QuantizePlan, num_linears: int, tier: str) -> int:
    """Bytes of the shapes that compressed-tensors notes beside every matrix, of `num_linears` linear layers too."""
    matrices = sum(len(layer.keep) * len(layer.options) for layer in plan.layers) + num_linears
    return SHAPE_BYTES * matrices if tier == "stock" else 0


def require_quantizable(config: QuantizeConfig, stream: LayerStream, tier: str) -> None:
    """Raise `UnsupportedModelError` for what cannot be packed; reads no weights."""
    embedding_tables(stream, config)
    packed: set[str] = set()
    if tier != "stock":
        return
    for moe in stream.moe_layers.values():
        for name in fused_parts(stream, moe):
            packed |= _require_single(stream, moe.layer, name).keys()
    for linear in linear_layers(stream.layers, stream.moe_layers):
        if linear.part in config.parts:
            packed |= _require_single(stream, linear.layer, f"{linear.path}.weight").keys()
    # What transformers merges on loading it dequantizes first, and weights that are not packed get lost there.
    lost = next((name for name in stream.merged() if name not in packed), None)
    if lost is not None:
        raise UnsupportedModelError(
            f"plain transformers cannot load packed checkpoints of this architecture: it merges tensors like `{lost}`, "
            "which are not packed, and would take them for packed ones; set `export.tier: plugin`."
        )


def _require_single(stream: LayerStream, index: int, name: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes that a weight of a layer has on disk, where they are single matrices."""
    dense = stream.layers[index].get_parameter(name).to("meta")
    shapes = {hub: tuple(tensor.shape) for hub, tensor in stream.hub_names(index, {name: dense}).items()}
    if any(len(shape) != 2 or not hub.endswith(".weight") for hub, shape in shapes.items()):
        raise UnsupportedModelError(
            f"`{name}` of layer {index} is not stored expert by expert in checkpoints of this architecture, so "
            "compressed-tensors cannot pack it; set `export.tier: plugin`."
        )
    return shapes


class PluginStorage:
    """Names `<experts>.<expert>.<projection>.<tensor>` and `<linear>.<tensor>`, as the runtime's modules have them."""

    def __init__(self, change: QuantizeChange) -> None:
        self.change = change

    def prepare(self, stream: LayerStream) -> None:
        """Nothing: the runtime's modules have the names that the model has."""

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """`config.json` with the scheme of every packed matrix."""
        change = self.change
        schemes: list[Scheme] = []

        def number(scheme: Scheme) -> int:
            if scheme not in schemes:
                schemes.append(scheme)
            return schemes.index(scheme)

        experts = {
            str(layer): {
                part: [None if name == KEEP else number(scheme_of(name, change.settings)) for name in names]
                for part, names in found.options.items()
            }
            for layer, found in change.layers.items()
        }
        linears = {f"{linear.layer}.{linear.path}": number(change.linear_scheme(linear)) for linear in change.linears}
        tables = {}
        if change.settings.embeddings is not None:
            tables = {"embeddings": number(embedding_scheme(change.settings))}
        packed = {
            "schemes": [scheme.to_json() for scheme in schemes],
            "scale_dtype": str(change.scale_dtype).removeprefix("torch."),
            "experts": experts,
            "linears": linears,
        } | tables
        section = config.get(SECTION) or plugin_section(len(change.plan.layers[0].keep))
        return plugin_config(config, section | {PACKED: packed})

    def pack(self, found: Quantized) -> list[Stored]:
        """The tensors of each matrix of a stack; the configuration knows their shapes."""
        packed = _slices(found)
        for tensors in packed:
            del tensors["weight_shape"]
        return packed

    def tensors(self, target: LayerStream, packed: Packed) -> Stored:
        """Everything that is written for a layer."""
        stored = target.stored_layer(packed.layer, without=self._replaced(target, packed.layer))
        prefix = f"{target.layers_name}.{packed.layer}."
        for path, (_, tensors) in packed.linears.items():
            stored |= {f"{prefix}{path}.{name}": tensor.cpu() for name, tensor in tensors.items()}
        moe = target.moe_layers.get(packed.layer)
        for (expert, part), (scheme, found) in packed.experts.items():
            assert moe is not None
            tensors = {"weight_plain": found} if scheme is None else found
            name = f"{moe.experts_name}.{expert}.{part}"
            stored |= {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in tensors.items()}
        return stored

    def expected(self, target: LayerStream, index: int) -> Tensors:
        """Names, types and shapes of what `tensors` must give, from the plan alone."""
        change, prefix = self.change, f"{target.layers_name}.{index}."
        expected = described(target.stored_layer(index, without=self._replaced(target, index)))

        def enter(name: str, scheme: Scheme | None, height: int, width: int) -> None:
            if scheme is None:
                expected[f"{name}.weight_plain"] = (SAFETENSORS_DTYPES[change.scale_dtype], (height, width))
                return
            for key, (shape, dtype) in scheme.tensors(height, width, change.scale_dtype).items():
                expected[f"{name}.{key}"] = (SAFETENSORS_DTYPES[dtype], shape)

        for linear in (linear for linear in change.linears if linear.layer == index):
            enter(f"{prefix}{linear.path}", change.linear_scheme(linear), *linear.shape)
        moe = target.moe_layers.get(index)
        if moe is not None and index not in target.owners:
            for part, (height, width) in projection_shapes(moe).items():
                for expert, name in enumerate(change.layers[index].options[part]):
                    scheme = None if name == KEEP else scheme_of(name, change.settings)
                    enter(f"{moe.experts_name}.{expert}.{part}", scheme, height, width)
        return expected

    def _replaced(self, target: LayerStream, index: int) -> set[str]:
        replaced = {f"{linear.path}.weight" for linear in self.change.linears if linear.layer == index}
        moe = target.moe_layers.get(index)
        return replaced | (fused_names(target, moe) if moe is not None else set())


class StockStorage:
    """compressed-tensors' own names beside the Hub's: `<matrix>.weight_packed`, `.weight_scale`, `.weight_shape`."""

    def __init__(self, change: QuantizeChange) -> None:
        self.change = change
        self._experts: list[str] = []  # targets: what names the packed matrices and nothing else
        self._linears: list[str] = []

    def prepare(self, stream: LayerStream) -> None:
        """Note how the Hub names what is packed, and the model the linear layers, by which transformers finds them."""
        experts = [
            name
            for moe in stream.moe_layers.values()
            for fused in fused_parts(stream, moe)
            for name in _require_single(stream, moe.layer, fused)
        ]
        linears = [
            name
            for linear in self.change.linears
            for name in (
                f"{stream.layers_name}.{linear.layer}.{linear.path}.weight",
                *_require_single(stream, linear.layer, f"{linear.path}.weight"),
            )
        ]
        self._experts = exact_targets(name.removesuffix(".weight") for name in experts)
        found = exact_targets(name.removesuffix(".weight") for name in linears)
        # transformers takes a group whose targets spell `experts` for that of the routed ones
        self._linears = [target.replace("experts", "expert[s]") for target in found]

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """`config.json` with the `quantization_config` that compressed-tensors reads."""
        change = self.change
        option = next(iter(change.plan.layers[0].options.values()))[0]
        groups = {"group_0": _group(scheme_of(option, change.settings), self._experts)}
        if change.linears:
            groups["group_1"] = _group(change.linear_scheme(change.linears[0]), self._linears)
        return config | {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": groups,
                "ignore": ["lm_head"],
                "kv_cache_scheme": None,
                "global_compression_ratio": None,
            }
        }

    def pack(self, found: Quantized) -> list[Stored]:
        """The tensors of each matrix of a stack."""
        return _slices(found)

    def tensors(self, target: LayerStream, packed: Packed) -> Stored:
        """Everything that is written for a layer: what happens to a weight's name and rows happens to its codes'."""
        replaced = {f"{path}.weight": tensors for path, (_, tensors) in packed.linears.items()}
        moe = target.moe_layers.get(packed.layer)
        if moe is not None:
            for fused, parts in fused_parts(target, moe).items():
                columns = [[packed.experts[expert, part][1] for expert in range(moe.num_experts)] for part in parts]
                replaced[fused] = {
                    name: torch.cat([torch.stack([found[name] for found in column]) for column in columns], dim=1)
                    for name in ("weight_packed", "weight_scale")
                }
        return self._stored(target, packed.layer, replaced)

    def expected(self, target: LayerStream, index: int) -> Tensors:
        """Names, types and shapes of what `tensors` must give, from the plan alone."""
        change, replaced = self.change, {}

        def empty(scheme: Scheme, *shape: int) -> Stored:
            *stack, height, width = shape
            found = scheme.tensors(height, width, change.scale_dtype)
            return {
                name: torch.empty(*stack, *size, dtype=dtype, device="meta") for name, (size, dtype) in found.items()
            }

        for linear in (linear for linear in change.linears if linear.layer == index):
            replaced[f"{linear.path}.weight"] = empty(change.linear_scheme(linear), *linear.shape)
        moe = target.moe_layers.get(index)
        if moe is not None:
            shapes = projection_shapes(moe)
            for fused, parts in fused_parts(target, moe).items():
                option = change.layers[index].options[parts[0]][0]
                rows, width = sum(shapes[part][0] for part in parts), shapes[parts[0]][1]
                replaced[fused] = empty(scheme_of(option, change.settings), moe.num_experts, rows, width)
        return described(self._stored(target, index, replaced))

    def _stored(self, target: LayerStream, index: int, replaced: dict[str, Stored]) -> Stored:
        stored = target.stored_layer(index, without=replaced)
        for name, tensors in replaced.items():
            shapes = _require_single(target, index, name)
            for key in ("weight_packed", "weight_scale"):
                for hub, tensor in target.hub_names(index, {name: tensors[key]}).items():
                    stored[hub.removesuffix("weight") + key] = tensor if tensor.is_meta else tensor.cpu().contiguous()
            for hub, shape in shapes.items():
                stored[hub.removesuffix("weight") + "weight_shape"] = torch.tensor(shape)
        return stored


def projection_shapes(moe: MoELayer) -> dict[str, tuple[int, int]]:
    """Rows and columns of one expert's projections."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, parts in projections(moe.experts).items():
        rows, columns = matrix_shape(moe.experts, getattr(moe.experts, name))
        shapes |= {part: (rows // len(parts), columns) for part in parts}
    return shapes


def fused_parts(target: LayerStream, moe: MoELayer) -> dict[str, tuple[str, ...]]:
    """The fused matrices of a layer by name inside it, and the projections that each holds."""
    path = moe.experts_name.removeprefix(f"{target.layers_name}.{moe.layer}.")
    return {f"{path}.{name}": parts for name, parts in projections(moe.experts).items()}


def fused_names(target: LayerStream, moe: MoELayer) -> set[str]:
    """The fused matrices of a layer by name inside it."""
    return set(fused_parts(target, moe))


def exact_targets(names: Iterable[str]) -> list[str]:
    """Regular expressions, as compressed-tensors writes them, that match these modules and no other.

    Modules whose names differ in the number of their layer, the first one in a name, share one; the experts of a layer,
    numbered further on, are packed all or none.
    """
    layers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        found = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        assert found is not None, "packed modules lie in a list of layers"
        rest = r"\.\d+".join(re.escape(part) for part in re.split(r"\.\d+(?=\.)", found[3]))
        layers.setdefault((found[1], rest), set()).add(int(found[2]))
    return [f"re:{re.escape(prefix)}{numbers(found)}{rest}$" for (prefix, rest), found in layers.items()]


def numbers(wanted: Iterable[int]) -> str:
    """A regular expression for these whole numbers, written in full, and no others."""
    digits: dict[str, str] = {}
    for number in sorted(set(wanted)):
        tens, last = str(number)[:-1], str(number)[-1]
        digits[tens] = digits.get(tens, "") + last
    return f"(?:{'|'.join(tens + (_DIGIT if len(last) == 10 else f'[{last}]') for tens, last in digits.items())})"


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    assert scheme.grid is not None and scheme.grid.symmetric, "what plain transformers can load"
    weights = {
        "num_bits": scheme.grid.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if scheme.grid.group_size is None else "group",
        "group_size": scheme.grid.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
