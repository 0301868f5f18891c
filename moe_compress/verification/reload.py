"""Run by `verify` in a fresh process: load a checkpoint with plain transformers and write the probe's logits.

    python reload.py FOLDER OUTPUT.npy whole|layers

This package is not imported here, and `verify` sees to it that it cannot be, unless the model's class comes from it.
`whole` is `from_pretrained`. `layers` is for checkpoints larger than memory: an empty model whose modules are filled,
run and emptied one after the other, by the conversion code that `from_pretrained` itself uses. What compressed-tensors
packed is unpacked by compressed-tensors then; what the model's class itself holds packed stays so.
"""

import sys
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import AutoHfQuantizer

# Last parts of the names that quantized weights are stored under.
QUANTIZED = {
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_absmax", "weight_plain",
}  # fmt: skip


class LayerwiseModel:
    """A model that reads each decoder layer, its embeddings and its head when their turn comes, and forgets them."""

    def __init__(self, model_class: Any, folder: Path, config: Any) -> None:
        self.stored_dtype: torch.dtype = config.dtype or config.get_text_config().dtype  # building sets it to float32
        with init_empty_weights(include_buffers=False), packed_weights_empty():
            self.model = model_class._from_config(config, dtype=torch.float32)
        self.quantizer = self.make_quantizer(config)
        self.mapping: list[Any] = get_model_conversion_mapping(self.model, hf_quantizer=self.quantizer)
        self.files: dict[str, Path] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            with safe_open(shard, "pt") as stored:
                self.files |= dict.fromkeys(stored.keys(), shard)
        self.sources, unexpected = self.find_sources()
        self.borrowed = self.find_borrowed()
        packed = {name for name in self.model.state_dict() if name.rpartition(".")[2] in QUANTIZED}
        require_all(packed - self.sources.keys() - self.borrowed.keys(), unexpected)
        self.retype_experts()
        experts = [name for name, module in self.model.named_modules() if hasattr(module, "is_transposed")]
        lists = {name: found for name, found in self.model.named_modules() if isinstance(found, torch.nn.ModuleList)}
        name, layers = next((n, found) for n, found in lists.items() if any(e.startswith(f"{n}.") for e in experts))
        ends = {self.model.get_input_embeddings(), self.model.get_output_embeddings()}
        turns = {f"{name}.{index}": layer for index, layer in enumerate(layers)}
        turns |= {path: module for path, module in self.model.named_modules() if module in ends}
        inside = tuple(f"{path}." for path in turns)
        self.fill([target for target in self.sources if not target.startswith(inside)])
        tied = not any(target.startswith(f"{path}.") for path in turns for target in self.sources if turns[path] is
                       self.model.get_output_embeddings())  # fmt: skip
        for path, module in turns.items():
            if tied and module in ends:
                self.fill([target for target in self.sources if target.startswith(f"{path}.")])
                continue
            module.register_forward_pre_hook(lambda module, inputs, path=path: self.enter(path, module))
            module.register_forward_hook(lambda module, inputs, output: self.leave(module))
        if tied:
            self.model.tie_weights()

    def make_quantizer(self, config: Any) -> Any:
        """transformers' own quantizer, when it has made room for packed linear layers; None where nothing is packed."""
        content = getattr(config, "quantization_config", None)
        if content is None:
            return None
        quantizer = AutoHfQuantizer.from_config(content, pre_quantized=True)
        quantizer.validate_environment()
        with torch.device("meta"):
            quantizer.preprocess_model(self.model)
        quantizer.compressor.remove_decompression_hook(self.model)  # which would unpack all layers at once
        return quantizer

    def find_sources(self) -> tuple[dict[str, list[str]], list[str]]:
        """The model's tensors, each with the stored tensors that it is made of; and what is stored besides."""
        renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        sources: dict[str, list[str]] = defaultdict(list)
        unexpected = []
        for key in self.files:
            target, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, known)
            if target in known or key in known:
                sources[target if target in known else key].append(key)
            else:
                unexpected.append(key)
        return dict(sources), unexpected

    def find_borrowed(self) -> dict[str, str]:
        """The model's tensors that are stored as another one's, with that one."""
        tensors = [*self.model.named_parameters(remove_duplicate=False)]
        tensors += self.model.named_buffers(remove_duplicate=False)
        stored = {id(tensor): name for name, tensor in tensors if name in self.sources}
        borrowed = {name: stored.get(id(tensor), "") for name, tensor in tensors}
        borrowed |= self.model.get_expanded_tied_weights_keys(all_submodels=True)
        return {name: owner for name, owner in borrowed.items() if owner in self.sources and name not in self.sources}

    def retype_experts(self) -> None:
        """Experts are converted in the type they are stored in, or unpacked to, then upcast: half the memory."""
        for name, parameter in [*self.model.named_parameters()]:
            if parameter.ndim != 3 or name not in self.sources:
                continue
            keys = self.sources[name]
            key = next((key for key in keys if key.endswith("weight_scale")), keys[0])
            with safe_open(self.files[key], "pt") as stored:
                dtype = stored.get_slice(key)[:1].dtype
            path, _, leaf = name.rpartition(".")
            self.model.get_submodule(path)._parameters[leaf] = torch.nn.Parameter(parameter.to(dtype), False)

    def enter(self, path: str, module: torch.nn.Module) -> None:
        """Fill a module; a tensor the checkpoint lacks is an error."""
        self.fill([target for target in self.sources if target.startswith(f"{path}.")])
        for name in (name for name in self.borrowed if name.startswith(f"{path}.")):
            self.borrow(name)
        missing = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
        if missing:
            raise ValueError(f"the checkpoint holds no weights for {path}.{missing[0]}")
        if self.quantizer is not None:
            self.unpack(module)

    def unpack(self, module: torch.nn.Module) -> None:
        """Unpack the linear layers in a module, to the very values that they stand for (see `to_float32`)."""
        from compressed_tensors.compressors import decompress_module

        for child in [child for child in module.modules() if hasattr(child, "weight_packed")]:
            decompress_module(child)
            weight = child.get_parameter("weight").to(self.stored_dtype).float()
            child.weight = torch.nn.Parameter(weight, requires_grad=False)

    def borrow(self, name: str) -> None:
        """Fill a tensor from what is stored as another one's, which stays empty unless they lie in the same module."""
        stored = self.borrowed[name]
        self.fill([stored])
        (own, _, leaf), (other, _, other_leaf) = name.rpartition("."), stored.rpartition(".")
        borrower, owner = self.model.get_submodule(own), self.model.get_submodule(other)
        if borrower is not owner:
            kind = "_parameters" if other_leaf in owner._parameters else "_buffers"
            getattr(borrower, kind)[leaf] = getattr(owner, kind)[other_leaf]
            self.leave(owner, [other_leaf])

    def leave(self, module: torch.nn.Module, names: Container[str] | None = None) -> None:
        """Empty a module, all of it or these of its tensors; what it computed for itself stays."""
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None and (names is None or name in names):
                    child._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
            for name, buffer in child._buffers.items():
                if buffer is not None and name in (QUANTIZED if names is None else names):
                    child._buffers[name] = buffer.to("meta")

    def fill(self, targets: list[str]) -> None:
        """Read the tensors of these parameters and packed buffers, one at a time."""
        settings = LoadStateDictConfig(
            weight_mapping=self.mapping, dtype=torch.float32, device_map={"": "cpu"}, hf_quantizer=self.quantizer
        )
        for target in targets:
            handles = {file: safe_open(file, "pt") for file in {self.files[key] for key in self.sources[target]}}
            state = {key: handles[self.files[key]].get_slice(key) for key in self.sources[target]}
            info, _ = convert_and_load_state_dict_in_model(self.model, state, settings)
            del state, handles
            for failed in (*info.mismatched_keys, *info.conversion_errors):
                raise ValueError(f"{target} cannot be made of what is stored of it: {failed}")
            path, _, leaf = target.rpartition(".")
            owner = self.model.get_submodule(path)
            found = owner._parameters.get(leaf)
            if found is not None and found.is_floating_point() and found.dtype != torch.float32:
                owner._parameters[leaf] = torch.nn.Parameter(found.float(), requires_grad=False)


@contextmanager
def packed_weights_empty() -> Iterator[None]:
    """Modules that hold packed weights, which are buffers, are made without memory for them."""
    register = torch.nn.Module.register_buffer

    def register_empty(module: torch.nn.Module, name: str, tensor: Any, persistent: bool = True) -> None:
        register(module, name, tensor.to("meta") if name in QUANTIZED else tensor, persistent)

    torch.nn.Module.register_buffer = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_buffer = register  # type: ignore[method-assign]


def require_all(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise `ValueError` when weights were made up, or quantized ones were left out.

    Other weights may be there that the model does not know: prediction heads, which no family loads.
    """
    for name in sorted(missing):
        raise ValueError(f"the checkpoint holds no weights for {name}")
    for name in sorted(unexpected):
        if name.rpartition(".")[2] in QUANTIZED:
            raise ValueError(f"the quantized tensor {name} belongs to no module")


def to_float32(model: Any, tokens: torch.Tensor, stored: torch.dtype) -> None:
    """Compute in float32 with the very values that a quantized checkpoint stands for.

    compressed-tensors unpacks linear layers in the first forward pass, here in float32 and so without the rounding to
    the stored type that experts get on loading. Experts are upcast while they run, one layer at a time.
    """
    model(input_ids=tokens[:, :1], use_cache=False)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight.data = module.weight.data.to(stored)
        if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)):
            kept = {parameter: parameter.data for parameter in module.parameters(recurse=False)}
            module.register_forward_pre_hook(lambda module, inputs: upcast(module))
            module.register_forward_hook(lambda module, inputs, output, kept=kept: put_back(kept))
        else:
            upcast(module)


def upcast(module: torch.nn.Module) -> None:
    """A module's own parameters in float32."""
    for parameter in module.parameters(recurse=False):
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()


def put_back(kept: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    """Parameters as they were."""
    for parameter, values in kept.items():
        parameter.data = values


def main(folder: Path, output: str, mode: str) -> None:
    """Load, run the probe, write its logits."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    model_class: Any = next(filter(None, named), None) or transformers.AutoModelForCausalLM
    if mode == "whole":
        model, info = model_class.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        require_all(info["missing_keys"], info["unexpected_keys"])
    else:
        if model_class is transformers.AutoModelForCausalLM:
            model_class = model_class._model_mapping[type(config)]
        model = LayerwiseModel(model_class, folder, config).model
    with np.load(folder / "probe.npz") as probe:
        tokens, positions = torch.from_numpy(probe["tokens"]), probe["positions"]
    with torch.no_grad():
        if mode == "whole" and getattr(config, "quantization_config", None) is not None:
            to_float32(model, tokens, config.dtype or config.get_text_config().dtype)
        logits = model.eval()(input_ids=tokens, use_cache=False).logits
    np.save(output, logits[0, positions].float().numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
