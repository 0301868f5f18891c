"""A model whose parameters are divided among processes (FSDP2), read so that none of them ever holds all of it.

Each decoder layer is read from the checkpoint, divided, and its other parts given back before the next one is read.
Layers that use the same tensors, such as a bank of experts, are gathered together. `fully_shard` is applied here and
not by `Accelerator.prepare`, for reasons in `docs/design-changes.md`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.errors import CheckpointError
from moe_compress.models.layers import decoder_layers
from moe_compress.models.skeleton import build_skeleton


def sharded_model(
    folder: Path, device: torch.device, *, processes: int, is_trained: bool, reshard: bool, in_bfloat16: bool
) -> Any:
    """The model of a checkpoint in float32, in evaluation mode, nothing of it trainable, every parameter divided.

    All processes call it together. With `reshard`, a layer's parameters are given back between its forward and its
    backward pass. With `in_bfloat16`, the parameters of layers are gathered as such, and gradients are still added up
    in float32. Gradients are sums over the processes, of parameters that one of them did not use too.
    """
    checkpoint = open_checkpoint(str(folder))
    stream = LayerStream(checkpoint)
    model: Any = build_skeleton(checkpoint.config, device=device, experts_implementation=None)
    mesh = init_device_mesh(device.type, (processes,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if in_bfloat16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    layers = list(decoder_layers(model)[1])
    for unit in units(layers):
        read: dict[nn.Parameter, nn.Parameter] = {}
        for index in unit:
            _fill(layers[index], stream.load(index), read)
            stream.release(index)
        fully_shard([layers[index] for index in unit], mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    stream.load_outside()
    _fill(model, stream.model, {})
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise CheckpointError(f"{folder} holds no weights for `{missing[0]}`.")
    # Gathered until the backward pass is through, which begins where the forward pass ends
    fully_shard(model, mesh=mesh, reshard_after_forward=None if is_trained else True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.set_reduce_scatter_unused_params(True)
    return model


def units(layers: Sequence[nn.Module]) -> list[list[int]]:
    """The layers that are gathered together: those that use the same parameters, and every other one by itself."""
    found: list[list[int]] = []
    unit_of: dict[nn.Parameter, list[int]] = {}
    for index, layer in enumerate(layers):
        parameters = list(layer.parameters())
        unit = next((unit_of[parameter] for parameter in parameters if parameter in unit_of), None)
        if unit is None:
            unit = []
            found.append(unit)
        unit.append(index)
        unit_of |= dict.fromkeys(parameters, unit)
    return found


def gathered(student: Any, trained: Collection[str], original: Any) -> int:
    """Elements that a process holds whole for a moment, where everything else is divided.

    Of the largest unit of layers its parameters and those of the next one, and what lies outside the layers; of what is
    trained the gradients too, a unit's as they are computed and on their way. The models may be empty.
    """

    def most(model: Any, trained: Collection[nn.Parameter]) -> int:
        layers = list(decoder_layers(model)[1])

        def size(parameters: Collection[nn.Parameter]) -> int:
            return sum(parameter.numel() * (2 if parameter in trained else 1) for parameter in parameters)

        inside = [{parameter for index in unit for parameter in layers[index].parameters()} for unit in units(layers)]
        return 2 * max(map(size, inside)) + size(set(model.parameters()).difference(*inside))

    return max(most(student, {student.get_parameter(name) for name in trained}), most(original, ()))


def whole(value: Tensor) -> Tensor:
    """All of a tensor that may be divided."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _fill(module: nn.Module, loaded: nn.Module, read: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put the tensors of a loaded module into an empty one, in float32; `read` has what was put somewhere before."""
    for path, child in module.named_modules():
        other = loaded.get_submodule(path)
        for name, parameter in child._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in read:
                read[parameter] = nn.Parameter(other._parameters[name].detach().float(), requires_grad=False)  # type: ignore[union-attr]
            child._parameters[name] = read[parameter]
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_meta:
                child._buffers[name] = other._buffers[name]
