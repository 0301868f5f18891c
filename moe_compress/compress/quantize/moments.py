"""Second moments of the inputs of one layer's matrices, matrix by matrix as the layer's forward pass comes to them.

Every batch of calibration tokens runs up to the inputs of a matrix and waits there; when all have been counted, the
matrix is quantized, and they go on with its new values. So each matrix sees what the quantized ones before it give, as
in the finished model, and nothing is computed twice. A pass that waits keeps its activations in memory; beyond
HELD_BYTES batches do not wait but start the layer anew for every matrix, which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moe_compress.checkpoint.memory import give_back
from moe_compress.checkpoint.rewrite import PROBES
from moe_compress.compress.quantize.gptq import POOL_BELOW, Hessians
from moe_compress.compress.quantize.shapes import LinearLayer
from moe_compress.compress.quantize.shared import load_moments
from moe_compress.models.experts import matrix_shape, routed_experts, routed_inner
from moe_compress.models.layers import MoELayer
from moe_compress.models.lockstep import Enough, Lockstep

HESSIAN_BYTES = 4 << 30  # of second moments held at a time
HELD_BYTES = 1 << 30  # of activations in passes that wait inside a layer, by estimate

Inputs = tuple[Any, ...]  # of a module


class Moments:
    """The batches of `run` inside layer `index`; to be closed before they leave it. The probe is counted nowhere.

    `shared` is the folder of moments of the layer's experts that were collected before, over all layers that use them.
    """

    def __init__(
        self,
        run: Lockstep,
        index: int,
        layer: nn.Module,
        moe: MoELayer | None,
        linears: Sequence[LinearLayer],
        shared: Path | None = None,
    ) -> None:
        self._run, self._index, self._layer, self._moe = run, index, layer, moe
        self._linears = {layer.get_submodule(linear.path): linear for linear in linears}
        self._shared = shared
        self._experts: Any = None if moe is None else moe.experts
        self._places = [*self._linears, *([] if moe is None else [moe.experts])]
        self._place: nn.Module | None = None  # where batches stop
        self._see: Callable[[Inputs], None] = lambda inputs: None
        self._ordering = False
        self._entered: dict[nn.Module, Tensor] = {}  # by the probe, in this order
        self._waiting: dict[int, int] = {}  # batch -> estimated bytes that its pass keeps
        self._counted: tuple[str, list[int], Tensor, list[int]] | None = None  # matrix, experts, moments, pooled ones
        self._inner: dict[int, dict[int, Tensor]] = {}  # batch -> expert -> inputs of its down projection
        self._hooks = [place.register_forward_pre_hook(self._enter) for place in self._places]

    def order(self) -> list[list[LinearLayer] | None]:
        """Linear layers that have the same inputs, in the order in which a pass comes to them; None: the experts.

        As the probe's pass finds it. What that does not come to, because the layer uses it in another way than calling
        it, is first, and is rounded.
        """
        self._ordering = True
        self._run.rehearse(self._index, PROBES)
        self._ordering = False
        groups: list[tuple[Tensor | None, list[LinearLayer] | None]] = []
        for module in [*(place for place in self._places if place not in self._entered), *self._entered]:
            tensor = self._entered.get(module)
            same = next((group for inputs, group in groups if group and inputs is tensor is not None), None)
            if module is self._experts:
                groups.append((tensor, None))
            elif same is None:
                groups.append((tensor, [self._linears[module]]))
            else:
                same.append(self._linears[module])
        return [group for _, group in groups]

    def linear(self, linear: LinearLayer) -> Tensor:
        """[1, I, I] of a linear layer's inputs."""
        module: Any = self._layer.get_submodule(linear.path)
        hessians = Hessians(1, linear.shape[1], module.weight.device)
        if module in self._entered:
            self._collect(module, lambda inputs: hessians.add(0, inputs[0].flatten(0, -2)))
        return hessians.finish(1)[0]

    def experts(self, name: str, members: list[int]) -> tuple[Tensor, list[int]]:
        """[len(members), I, I] of these experts' inputs of a fused matrix, and those whose moment was pooled.

        All experts of the layer are counted, and pooled, together where there is memory for it.
        """
        if self._counted is None or self._counted[0] != name or not set(members) <= set(self._counted[1]):
            self._counted = None
            width = matrix_shape(self._experts, getattr(self._experts, name))[1]
            every = list(range(len(getattr(self._experts, name))))
            counted = every if 4 * len(every) * width**2 <= HESSIAN_BYTES else members
            self._counted = name, counted, *self._count(name, counted, width)
        _, counted, moments, few = self._counted
        if members != counted:
            moments = moments[[counted.index(expert) for expert in members]]
        return moments, [expert for expert in members if expert in few]

    def _count(self, name: str, members: list[int], width: int) -> tuple[Tensor, list[int]]:
        experts, fused = self._experts, getattr(self._experts, name)
        if self._shared is not None:
            moments, few = load_moments(self._shared, self._index, name).finish(POOL_BELOW)
            return moments[list(members)].to(fused.device), [expert for expert in members if expert in few]
        hessians = Hessians(len(members), width, fused.device)
        position = {expert: number for number, expert in enumerate(members)}

        def see(inputs: Inputs) -> None:
            hidden_TH, index_TK, gate_TK = inputs
            for expert, slot_N in routed_experts(experts, index_TK, gate_TK):
                if expert not in position:
                    continue
                if name != "down_proj":
                    inputs_NI = hidden_TH.index_select(0, slot_N // index_TK.shape[1])
                else:
                    inputs_NI = routed_inner(experts, expert, hidden_TH, index_TK, slot_N)
                    if self._run.batch in self._waiting:
                        self._inner.setdefault(self._run.batch, {})[expert] = inputs_NI
                hessians.add(position[expert], inputs_NI)

        self._collect(experts, see)
        moments, few = hessians.finish(POOL_BELOW)
        return moments, [members[number] for number in few]

    def close(self) -> None:
        """Let the batches go on; the next time they run they pass the layer."""
        self._place = self._counted = None
        self._entered.clear()
        for hook in self._hooks:
            hook.remove()

    def _collect(self, module: nn.Module, see: Callable[[Inputs], None]) -> None:
        """Run all batches up to a module and look at its inputs."""
        self._place, self._see = module, see
        self._run.rehearse(self._index)
        give_back()

    def _enter(self, module: nn.Module, inputs: Inputs) -> None:
        if self._ordering:
            self._entered.setdefault(module, inputs[0])
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
            width = 2 * tensor.shape[-1] + sum(sum(linear.shape) for linear in self._linears.values())
            if self._moe is not None:
                width += self._moe.top_k * matrix_shape(self._experts, self._experts.down_proj)[1]
            held = 4 * width * (tensor.numel() // tensor.shape[-1])
            if sum(self._waiting.values()) + held > HELD_BYTES:
                return False
            self._waiting[batch] = held
        return True


def chunks(members: list[int], width: int) -> Iterator[list[int]]:
    """Experts whose second moments [width, width] fit into memory together."""
    count = max(1, HESSIAN_BYTES // (4 * width**2))
    for start in range(0, len(members), count):
        yield members[start : start + count]
