"""The empty model: every module in place, no weights read.

Parameters and persistent buffers live on the meta device and take no memory. Buffers that no checkpoint holds (rotary
frequencies and the like) are computed for real, so a layer works as soon as its own weights are there.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moe_compress.errors import UnsupportedModelError


def model_class(config: PretrainedConfig) -> Any:
    """The class the checkpoint itself names, or the causal language model registered for its configuration."""
    for name in config.architectures or ():
        if (found := getattr(transformers, name, None)) is not None:
            return found
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM._model_mapping[type(config)]
    raise UnsupportedModelError(f"transformers has no causal language model for `{config.model_type}`.")


def build_skeleton(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    experts_implementation: str = "eager",
) -> PreTrainedModel:
    """An empty model in evaluation mode.

    `dtype` is that of the meta parameters, `device` where the computed buffers live, `experts_implementation` a name
    in `transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS`. The configuration is copied, not changed.
    """
    config = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        model = model_class(config)._from_config(config, dtype=dtype, experts_implementation=experts_implementation)
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
