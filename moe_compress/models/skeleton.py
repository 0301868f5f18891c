"""The empty model: every module in place, no weights read.

Parameters and persistent buffers live on the meta device and take no memory. Buffers that no checkpoint holds (rotary
frequencies and the like) are computed for real, so a layer works as soon as its own weights are there.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel

from moe_compress.errors import UnsupportedModelError

SUPPORTED = "supported are the Mixture-of-Experts language models of `docs/architectures.md`"


def model_class(config: PretrainedConfig) -> Any:
    """The class the checkpoint itself names, or the causal language model registered for its configuration.

    Raises `UnsupportedModelError` when that is no class whose forward pass gives the logits of every next token:
    classifiers, diffusion models, pipelines of several models.
    """
    named = [found for name in config.architectures or () if (found := getattr(transformers, name, None)) is not None]
    if not named and type(config) in AutoModelForCausalLM._model_mapping:
        named.append(AutoModelForCausalLM._model_mapping[type(config)])
    if not named:
        raise UnsupportedModelError(
            f"transformers has no causal language model for `{config.model_type}`; {SUPPORTED}."
        )
    if not issubclass(named[0], GenerationMixin) or named[0].forward is nn.Module.forward:
        raise UnsupportedModelError(
            f"{named[0].__name__} does not give the logits of every next token in a forward pass; {SUPPORTED}."
        )
    return named[0]


def build_skeleton(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    experts_implementation: str | None = "eager",
) -> PreTrainedModel:
    """An empty model in evaluation mode.

    `dtype` is that of the meta parameters, `device` where the computed buffers live, `experts_implementation` a name
    in `transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS`, or None for the one that transformers would take. The
    configuration is copied, not changed.

    Raises `UnsupportedModelError` when the model is no language model, or cannot be built as it is configured.
    """
    config = type(config).from_dict(config.to_dict())
    found = model_class(config)
    try:
        with torch.device("meta"):
            model = found._from_config(config, dtype=dtype, experts_implementation=experts_implementation)
    except Exception as error:  # every architecture fails in its own way on settings that do not fit
        raise UnsupportedModelError(
            f"transformers cannot build {found.__name__} from this configuration ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0].rstrip('.')}); correct its config.json, or update transformers."
        ) from error
    for module in model.modules():
        _compute_buffers(model, module, torch.device(device))
    return model.eval()  # type: ignore[no-any-return]


def release(module: nn.Module) -> None:
    """Give back the memory of a module's weights; computed buffers stay."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                child._buffers[name] = buffer.to("meta")


def _compute_buffers(model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    """Replace this module's own non-persistent meta buffers by their computed values, as `from_pretrained` does."""
    empty = {
        name: torch.empty_like(buffer, device="cpu")
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set
    }
    if empty:
        module._buffers.update(empty)
        model._init_weights(module)  # computes buffers; weights are on the meta device, where it does nothing
        module._buffers.update({name: module.get_buffer(name).to(device) for name in empty})
