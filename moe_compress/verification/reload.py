"""Run by `verify` in a fresh process: load a checkpoint with plain transformers and write the probe's logits.

    python reload.py FOLDER OUTPUT.npy whole|layers

This package is not imported here, and `verify` sees to it that it cannot be. `whole` is `from_pretrained`. `layers` is
for checkpoints larger than memory: an empty model whose modules are filled, run and emptied one after the other, by the
conversion code that `from_pretrained` itself uses.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable
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

# Last parts of the names that quantized weights are stored under.
QUANTIZED = {
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_absmax", "weight_plain",
}  # fmt: skip


class LayerwiseModel:
    """A model that reads each decoder layer, its embeddings and its head when their turn comes, and forgets them."""

    def __init__(self, model_class: Any, folder: Path, config: Any) -> None:
        with init_empty_weights(include_buffers=False):
            self.model = model_class._from_config(config, dtype=torch.float32)
        shared = list(shared_tensors(self.model))
        for module in self.model.modules():
            empty_buffers(module)
        self.mapping: list[Any] = get_model_conversion_mapping(self.model)
        self.files: dict[str, Path] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            with safe_open(shard, "pt") as stored:
                self.files |= dict.fromkeys(stored.keys(), shard)
        renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        self.sources: dict[str, list[str]] = defaultdict(list)  # parameter -> stored tensors
        for key in self.files:
            target, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, known)
            if target in known or key in known:
                self.sources[target if target in known else key].append(key)
        experts = [name for name, parameter in self.model.named_parameters() if parameter.ndim == 3]
        for name in filter(
            self.sources.get, experts
        ):  # converted in the type they are stored in, then upcast: half the memory
            path, _, leaf = name.rpartition(".")
            with safe_open(self.files[self.sources[name][0]], "pt") as stored:
                dtype = stored.get_slice(self.sources[name][0])[:1].dtype
            owner = self.model.get_submodule(path)
            owner._parameters[leaf] = torch.nn.Parameter(owner._parameters[leaf].to(dtype), requires_grad=False)
        # experts whose weights another layer stores, with that layer's name of them
        self.shared = {name: stored for name, stored in shared if stored in self.sources}
        modules = dict(self.model.named_modules())
        found = [name for name, module in modules.items() if hasattr(module, "is_transposed")]  # fused experts
        lists = {name: module for name, module in modules.items() if isinstance(module, torch.nn.ModuleList)}
        name, layers = next((name, each) for name, each in lists.items() if any(e.startswith(name) for e in found))
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

    def enter(self, path: str, module: torch.nn.Module) -> None:
        """Fill a module; a tensor the checkpoint lacks is an error."""
        self.fill([target for target in self.sources if target.startswith(f"{path}.")])
        for name, stored in self.shared.items():
            if name.startswith(f"{path}."):
                self.fill([stored])
                self.move(stored, name)
        missing = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
        if missing:
            raise ValueError(f"the checkpoint holds no weights for {path}.{missing[0]}")

    def leave(self, module: torch.nn.Module) -> None:
        """Empty a module; what it computed for itself stays."""
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    child._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
            empty_buffers(child)

    def move(self, source: str, target: str) -> None:
        """Take a tensor out of the module that stores it, which is empty otherwise, and put it where it is used."""
        (owner, leaf), (user, own) = ((self.model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2])
                                      for n in (source, target))  # fmt: skip
        held = "_parameters" if leaf in owner._parameters else "_buffers"
        tensor = getattr(owner, held)[leaf]
        if user is not owner:
            getattr(owner, held)[leaf] = torch.nn.Parameter(tensor.to("meta"), requires_grad=False)
        getattr(user, held)[own] = tensor

    def fill(self, targets: list[str]) -> None:
        """Read the tensors of these parameters, one parameter at a time."""
        settings = LoadStateDictConfig(weight_mapping=self.mapping, dtype=torch.float32, device_map={"": "cpu"})
        for target in targets:
            handles = {file: safe_open(file, "pt") for file in {self.files[key] for key in self.sources[target]}}
            state = {key: handles[self.files[key]].get_slice(key) for key in self.sources[target]}
            convert_and_load_state_dict_in_model(self.model, state, settings)
            del state, handles
            path, _, leaf = target.rpartition(".")
            owner = self.model.get_submodule(path)
            if leaf in owner._parameters and owner._parameters[leaf].dtype != torch.float32:
                owner._parameters[leaf] = torch.nn.Parameter(owner._parameters[leaf].float(), requires_grad=False)


def shared_tensors(model: Any) -> Iterable[tuple[str, str]]:
    """Each tensor of experts that another layer stores, and the name it is stored under."""
    yield from ((name, stored) for name, stored in model.all_tied_weights_keys.items() if ".experts." in name)
    first: dict[int, str] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):  # packed ones are in modules of several layers
        stored = first.setdefault(id(buffer), name)
        if stored != name and ".experts." in name:
            yield name, stored


def empty_buffers(module: torch.nn.Module) -> None:
    """Give back the memory of what a checkpoint holds in buffers."""
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            module._buffers[name] = buffer.to("meta")


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
        if getattr(config, "quantization_config", None) is not None:
            to_float32(model, tokens, config.dtype or config.get_text_config().dtype)
        logits = model.eval()(input_ids=tokens, use_cache=False).logits
    np.save(output, logits[0, positions].float().numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
