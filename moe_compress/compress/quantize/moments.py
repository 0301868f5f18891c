"""Second moments of the inputs of one layer's matrices, matrix by matrix as the layer's forward pass comes to them.

Every batch of calibration tokens runs up to the inputs of a matrix and waits there; when all have been counted, the
matrix is quantized, and they go on with its new values. So each matrix sees what the quantized ones before it give, as
in the finished model, and nothing is computed twice. A pass that waits keeps its activations in memory; beyond
HELD_BYTES batches do not wait but start the layer anew for every matrix, which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from moe_compress.checkpoint.rewrite import PROBES
from moe_compress.compress.quantize.gptq import POOL_BELOW, Hessians
from moe_compress.compress.quantize.shapes import LinearLayer
from moe_compress.models.experts import expert_inner, matrix_shape, routed_tokens
from moe_compress.models.layers import MoELayer
from moe_compress.models.lockstep import Enough, Lockstep

HELD_BYTES = 1 << 30  # of activations in passes that wait inside a layer, by estimate

Inputs = tuple[Any, ...]  # of a module


class Moments:
    """The batches of `run` inside layer `index`; to be closed before they leave it. The probe is counted nowhere."""

    def __init__(
        self, run: Lockstep, index: int, layer: nn.Module, moe: MoELayer | None, linears: Sequence[LinearLayer]
    ) -> None:
        self._run, self._index, self._moe = run, index, moe
        self._modules = {linear.path: layer.get_submodule(linear.path) for linear in linears}
        self._linears = list(linears)
        self._experts: Any = None if moe is None else moe.experts
        self._place: nn.Module | None = None  # where batches stop
        self._see: Callable[[Inputs], None] = lambda inputs: None
        self._entered: list[tuple[nn.Module, Tensor]] | None = None
        self._waiting: dict[int, int] = {}  # batch -> estimated bytes that its pass keeps
        self._inner: dict[int, dict[int, Tensor]] = {}  # batch -> expert -> inputs of its down projection
        places = [*self._modules.values(), *([] if moe is None else [moe.experts])]
        self._hooks = [place.register_forward_pre_hook(self._enter) for place in places]

    def order(self) -> list[list[LinearLayer] | None]:
        """Linear layers that have the same inputs, in the order in which a pass comes to them; None: the experts.

        As the probe's pass finds it. What that does not come to is last, and is rounded.
        """
        self._entered = []
        self._run.rehearse(self._index, PROBES)
        entered, self._entered = self._entered, None
        groups: list[tuple[Tensor, list[LinearLayer] | None]] = []
        left = list(self._linears)
        for module, tensor in entered:
            if module is self._experts:
                if all(group is not None for _, group in groups):
                    groups.append((tensor, None))
                continue
            linear = next((linear for linear in left if self._modules[linear.path] is module), None)
            if linear is None:
                continue  # it was here before
            left.remove(linear)
            same = next((group for inputs, group in groups if group is not None and inputs is tensor), None)
            if same is None:
                groups.append((tensor, [linear]))
            else:
                same.append(linear)
        missed: list[list[LinearLayer] | None] = [[linear] for linear in left]
        if self._experts is not None and all(group is not None for _, group in groups):
            missed.append(None)
        self._missed = [linear.path for linear in left]
        return [*(group for _, group in groups), *missed]

    def linear(self, linear: LinearLayer) -> Tensor:
        """[1, I, I] of a linear layer's inputs."""
        module: Any = self._modules[linear.path]
        hessians = Hessians(1, linear.shape[1], module.weight.device)
        if linear.path not in self._missed:
            self._collect(module, lambda inputs: hessians.add(0, inputs[0].flatten(0, -2)))
        return hessians.finish(1)[0]

    def experts(self, name: str, members: Sequence[int]) -> tuple[Tensor, list[int]]:
        """[len(members), I, I] of these experts' inputs of a fused matrix, and those whose moment was pooled."""
        experts, fused = self._experts, getattr(self._experts, name)
        hessians = Hessians(len(members), matrix_shape(experts, fused)[1], fused.device)
        position = {expert: number for number, expert in enumerate(members)}

        def see(inputs: Inputs) -> None:
            hidden_TH, index_TK, gate_TK = inputs
            for expert, slot_N in routed_tokens(index_TK, gate_TK, len(fused)):
                if expert not in position:
                    continue
                inputs_NI = hidden_TH.index_select(0, slot_N // index_TK.shape[1])
                if name == "down_proj":
                    inputs_NI = expert_inner(experts, expert, inputs_NI)
                    if self._run.batch in self._waiting:
                        self._inner.setdefault(self._run.batch, {})[expert] = inputs_NI
                hessians.add(position[expert], inputs_NI)

        self._collect(experts, see)
        moments, few = hessians.finish(POOL_BELOW)
        return moments, [members[number] for number in few]

    def close(self) -> None:
        """Let the batches go on; the next time they run they pass the layer."""
        self._place = None
        for hook in self._hooks:
            hook.remove()

    def _collect(self, module: nn.Module, see: Callable[[Inputs], None]) -> None:
        """Run all batches up to a module and look at its inputs."""
        self._place, self._see = module, see
        self._run.rehearse(self._index)

    def _enter(self, module: nn.Module, inputs: Inputs) -> None:
        if self._entered is not None:
            self._entered.append((module, inputs[0]))
        while module is self._place:
            if self._run.batch >= PROBES:
                self._see(inputs)
            if not self._may_wait(inputs[0]):
                raise Enough
            self._run.hold()
        if module is self._experts and self._run.batch in self._inner:
            module.__dict__["known_inner"] = self._inner.pop(self._run.batch)

    def _may_wait(self, tensor: Tensor) -> bool:
        """Whether there is memory for the activations of one more pass, all linear layers' inputs and outputs."""
        batch = self._run.batch
        if batch not in self._waiting:
            width = 2 * tensor.shape[-1] + sum(sum(linear.shape) for linear in self._linears)
            if self._moe is not None:
                width += self._moe.top_k * matrix_shape(self._experts, self._experts.down_proj)[1]
            held = 4 * width * (tensor.numel() // tensor.shape[-1])
            if sum(self._waiting.values()) + held > HELD_BYTES:
                return False
            self._waiting[batch] = held
        return True
