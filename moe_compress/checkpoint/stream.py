"""One decoder layer of a checkpoint in memory at a time, in the model's own layout, and back in the Hub's.

Names and layouts are converted by `transformers` itself (`core_model_loading`), so nothing here knows a tensor's name.
A checkpoint's tensors fall in three kinds: those of a decoder layer, those the forward pass needs besides (embeddings,
final norm, head), and those it does not know (prediction heads, vision towers); only the first are ever rewritten.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from moe_compress.checkpoint.index import TensorInfo
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.errors import CheckpointError
from moe_compress.models.experts import IMPLEMENTATION
from moe_compress.models.layers import MoELayer, decoder_layers, find_moe_layers, owners
from moe_compress.models.linear import speed_up
from moe_compress.models.skeleton import build_skeleton, release
from moe_compress.runtime.banks import share

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
BUNDLE_BYTES = 64 << 20  # read together what is smaller than this


class StoredTensor:
    """A tensor on disk that is read when it is sliced, as the loader of `transformers` expects."""

    def __init__(self, info: TensorInfo) -> None:
        self.info = info

    def __getitem__(self, item: Any) -> Tensor:
        return read_tensor(self.info)[item]

    def get_shape(self) -> list[int]:
        return list(self.info.shape)


def read_tensor(info: TensorInfo) -> Tensor:
    """The stored tensor, mapped from its file; `CheckpointError` for a dtype that torch does not compute with."""
    if info.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"`{info.name}` is stored as {info.dtype}, which is not supported; dequantize it first.")
    if not info.nbytes:
        return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
    try:
        raw = np.memmap(info.file, dtype=np.uint8, mode="c", offset=info.start, shape=(info.nbytes,))
    except (OSError, ValueError):
        raise CheckpointError(f"The shard {info.file} cannot be read; download it again.") from None
    return torch.from_numpy(raw).view(TORCH_DTYPES[info.dtype]).reshape(info.shape)


def stored_targets(model: Any, mapping: list[Any], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each stored tensor's name with that of the model's tensor it is for, or goes into; empty where there is none."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    for name in names:
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        yield name, target if target in known else name if name in known else ""


class LayerStream:
    """The layers of one checkpoint.

    Weights outside the experts are resident in float32, which holds every 16-bit value exactly and is the fast type of
    most CPUs; experts stay in the type they are stored in and are upcast one by one as they run.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> None:
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.model: Any = build_skeleton(checkpoint.config, device=device, experts_implementation=IMPLEMENTATION)
        speed_up(self.model)
        self.layers_name, self.layers = decoder_layers(self.model)
        self.moe_layers: dict[int, MoELayer] = {found.layer: found for found in find_moe_layers(self.model)}
        self.owners = owners(self.model.config)
        self._mapping: list[Any] = get_model_conversion_mapping(self.model)
        self._sort_names()

    def _sort_names(self) -> None:
        """Which stored tensor belongs to which layer, to the rest of the forward pass, or to neither."""
        prefix = f"{self.layers_name}."
        trunk = f"{self.layers_name.rpartition('.')[0]}."
        ends = {name: module for name, module in self.model.named_modules() if module in self._ends()}
        layer_names: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        self.trunk_names: list[str] = []
        self.end_names: dict[nn.Module, list[str]] = {module: [] for module in ends.values()}
        self.untouched: list[str] = []
        self.outside_targets: dict[str, str] = {}  # of these, the ones the model knows, with their name in it
        sources: dict[str, set[str]] = defaultdict(set)
        for name, target in stored_targets(self.model, self._mapping, self.checkpoint.index):
            if target.startswith(prefix):
                layer_names[int(target[len(prefix) :].split(".")[0])][target].append(name)
                sources[target].add(self.checkpoint.index[name].dtype)
                continue
            self.untouched.append(name)
            if target:
                self.outside_targets[name] = target
            end = next((module for path, module in ends.items() if target.startswith(f"{path}.")), None)
            if end is not None:
                self.end_names[end].append(name)
            elif target.startswith(trunk):
                self.trunk_names.append(name)
        self.stored_dtypes = {target: min(dtypes) for target, dtypes in sources.items()}
        self.layer_names = [layer_names[index] for index in range(len(self.layers))]
        self.model._weight_conversions = [entry for entry in self._mapping if entry.was_used()]
        exact = {target for found in self.moe_layers.values() for target in self._retype_experts(found, sources)}
        self._refuse_rounding({target: dtypes for target, dtypes in sources.items() if target not in exact})

    def _retype_experts(self, moe: MoELayer, sources: Mapping[str, set[str]]) -> set[str]:
        """Give the empty experts of a layer the types they are stored in; returns those that need not be rounded.

        `sources` has the stored types by target. What is new to a layer takes the type of its down projections.
        """
        owner = self.moe_layers[self.owners.get(moe.layer, moe.layer)]
        own = list(moe.expert_tensors())
        down = next(name for name in own if name.endswith("down_proj"))
        exact = set()
        for name in [*own, *moe.bank_tensors()]:
            like = (
                f"{moe.block_name}.{name}",
                *(f"{owner.block_name}.{n}" for n in (name, name.replace("differences.", ""), down)),
            )
            target = next(target for target in like if target in sources)
            dtypes = sources[target]
            dtype = TORCH_DTYPES.get(min(dtypes), torch.float32) if len(dtypes) == 1 else torch.float32
            _retype(moe.block, name, dtype)
            if dtype == torch.float64:
                exact.add(target)
        return exact

    def _refuse_rounding(self, sources: Mapping[str, set[str]]) -> None:
        """Refuse what float32, the type of all but the experts, does not hold exactly."""
        for target, dtypes in sources.items():
            if "F64" in dtypes:
                raise CheckpointError(
                    f"`{target}` is stored as F64 and would be rounded on its way through the model; convert the "
                    "checkpoint to F32 first."
                )

    def _ends(self) -> list[nn.Module]:
        return [self.model.get_input_embeddings(), self.model.get_output_embeddings()]

    def load_trunk(self) -> None:
        """Make resident what the forward pass needs besides the layers; the head comes later, with `load_head`."""
        self._load(self.trunk_names)
        self._load_end(self.model.get_input_embeddings())

    def release_embeddings(self) -> None:
        """Give back the memory of the input embeddings, unless they are the head too."""
        embeddings, head = self._ends()
        if self.end_names[head]:
            release(embeddings)

    def load_head(self) -> None:
        """Make the output head resident."""
        self._load_end(self.model.get_output_embeddings())

    def load_outside(self) -> None:
        """Make resident all that the model knows besides the layers, whether a forward pass needs it or not."""
        self._load(list(self.outside_targets))
        self.model.tie_weights()

    def _load_end(self, module: nn.Module) -> None:
        self._load(self.end_names[module])
        if not self.end_names[self._ends()[1]]:
            self.model.tie_weights()
        if any(parameter.is_meta for parameter in module.parameters()):
            raise CheckpointError(f"{self.checkpoint.folder} holds no weights for the {type(module).__name__} module.")

    def load(self, index: int) -> nn.Module:
        """Make layer `index` resident; raises `CheckpointError` when the checkpoint lacks one of its tensors."""
        for names in self._bundles(self.layer_names[index]):
            self._load(names)
        if index in self.owners:
            self._borrow(index)
        layer = self.layers[index]
        missing = [name for name, tensor in layer.state_dict().items() if tensor.is_meta]
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.folder} holds no weights for `{self.layers_name}.{index}.{missing[0]}`."
            )
        return layer

    def release(self, index: int) -> None:
        """Give the layer's memory back."""
        release(self.layers[index])

    def passing(self, index: int, packs: Collection[str] = ()) -> list[str]:
        """The stored tensors of a layer that have no entry per expert, which nothing changes on their way.

        `packs` names the tensors inside the layer that are changed all the same.
        """
        moe = self.moe_layers.get(index)
        changed = {f"{self.layers_name}.{index}.{name}" for name in (*(moe.counted if moe is not None else ()), *packs)}
        return [name for target, stored in self.layer_names[index].items() if target not in changed for name in stored]

    def merged(self) -> Iterator[str]:
        """The stored weights (`*.weight`) that transformers merges into larger tensors on loading."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        # as a quantizer of transformers picks them
        merging = {
            pattern
            for entry in converters
            if len(entry.target_patterns) == 1
            and all(source.endswith(".weight") for source in entry._original_source_patterns)
            for pattern in entry.source_patterns
        }
        known, prefix = self.model.state_dict(), self.model.base_model_prefix
        for name in self.checkpoint.index:
            target, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if pattern in merging and target in known:
                yield name

    def stored_layer(self, index: int, without: Collection[str] = ()) -> dict[str, Tensor]:
        """The layer's tensors under the Hub's names, in the source's types; on the meta device if not resident.

        `without` names tensors inside the layer that are left out, as are those that another layer stores.
        """
        without = {*without, *self.borrowed(index)}
        state = {name: tensor for name, tensor in self.layers[index].state_dict().items() if name not in without}
        return {name: self._as_stored(name, tensor) for name, tensor in self.hub_names(index, state).items()}

    def borrowed(self, index: int) -> list[str]:
        """The tensors of a layer that another layer stores, by name inside it."""
        if index not in self.owners:
            return []
        moe = self.moe_layers[index]
        return [f"{moe.block_path}.{name}".lstrip(".") for name in moe.expert_tensors()]

    def hub_names(self, index: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name inside the layer, in the model's layout, as the Hub names and divides them."""
        prefix = f"{self.layers_name}.{index}."
        found: dict[str, Tensor] = revert_weight_conversion(
            self.model, {prefix + name: tensor for name, tensor in state.items()}
        )
        return found

    def _borrow(self, index: int) -> None:
        """Load the experts that another layer stores, which is not resident, into layer `index`."""
        owner, moe = self.moe_layers[self.owners[index]], self.moe_layers[index]
        wanted = {f"{owner.block_name}.{name}" for name in owner.expert_tensors()}
        stored = self.layer_names[owner.layer]
        for names in self._bundles({target: stored[target] for target in stored if target in wanted}):
            self._load(names)
        share(moe.experts, owner.experts)
        release(owner.experts)

    def _as_stored(self, name: str, tensor: Tensor) -> Tensor:
        info = self.checkpoint.index.get(name)
        dtype = tensor.dtype if info is None else TORCH_DTYPES[info.dtype]
        return tensor.to(dtype) if tensor.is_meta else tensor.to("cpu", dtype)

    def _bundles(self, groups: Mapping[str, list[str]]) -> Iterator[list[str]]:
        """The names of a layer in a few portions, those of one parameter together: one large parameter at a time."""
        bundle: list[str] = []
        for names in groups.values():
            bundle += names
            if sum(self.checkpoint.index[name].nbytes for name in bundle) > BUNDLE_BYTES:
                yield bundle
                bundle = []
        yield bundle

    def _load(self, names: list[str]) -> None:
        state: Mapping[str, Any] = {name: StoredTensor(self.checkpoint.index[name]) for name in names}
        settings = LoadStateDictConfig(weight_mapping=self._mapping, dtype=torch.float32, device_map={"": self.device})
        conversions = self.model._weight_conversions
        info, _ = convert_and_load_state_dict_in_model(self.model, dict(state), settings)
        self.model._weight_conversions = conversions
        if info.mismatched_keys:
            name, stored, expected = sorted(info.mismatched_keys)[0]
            raise CheckpointError(f"`{name}` has the shape {tuple(stored)}, the configuration says {tuple(expected)}.")
        if info.conversion_errors:
            name, trace = sorted(info.conversion_errors.items())[0]
            reason = trace.strip().splitlines()[-1].rstrip(".")
            raise CheckpointError(f"`{name}` cannot be made: a tensor of it is missing or damaged ({reason}).")


def _retype(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Give a meta parameter another dtype."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    owner._parameters[leaf] = nn.Parameter(owner._parameters[leaf].to(dtype), requires_grad=False)  # type: ignore[union-attr]
