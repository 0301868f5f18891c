"""What an MoE block does when one of its experts is gone: as pruning leaves it, without touching its weights.

The block of the same architecture with one expert less runs on the experts that are there; its router, of one row less,
says who takes the lost expert's place, with the gate values that the model gives. Where that cannot be (routers that
choose among groups of equal size, blocks that are a whole decoder layer) the expert is silenced: its tokens keep
their other experts, with the gate values they had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from moe_compress.models.experts import IMPLEMENTATION, experts_forward
from moe_compress.models.layers import MoELayer, family_num_experts, find_moe_layers, routing_groups, with_expert_counts
from moe_compress.models.skeleton import build_skeleton, release


class ReducedBlocks:
    """The MoE blocks of the model with one expert less in every layer, empty until they borrow a layer's weights."""

    def __init__(self, config: PretrainedConfig, device: torch.device | str = "cpu") -> None:
        model = build_skeleton(config)
        num_experts = family_num_experts(model)
        counts = {moe.layer: moe.num_experts - 1 for moe in find_moe_layers(model)}
        fewer = with_expert_counts(config, num_experts, num_experts - 1, counts)
        reduced = build_skeleton(fewer, device=device, experts_implementation=IMPLEMENTATION)
        self._layers = {moe.layer: moe for moe in find_moe_layers(reduced)}

    def borrow(self, moe: MoELayer, expert: int) -> tuple[MoELayer, Tensor]:
        """The reduced block with the weights of `moe` but for its experts, and the numbers that its experts have there.

        The numbers are int64 [E]: of the E - 1 that are left, and last E, for slots without an expert.
        """
        reduced = self._layers[moe.layer]
        left = torch.tensor([other for other in range(moe.num_experts) if other != expert])
        state = moe.block.state_dict()
        for name, (tensor, dimension) in moe.router_tensors().items():
            rows = moe.rows(left, tensor.shape[dimension]).to(tensor.device)
            state[name] = tensor.detach().index_select(dimension, rows)
        experts = {name for name in state if name in moe.expert_tensors()}
        reduced.block.load_state_dict({k: v for k, v in state.items() if k not in experts}, strict=False, assign=True)
        return reduced, torch.cat([left, torch.tensor([moe.num_experts])])

    def forget(self, moe: MoELayer) -> None:
        """Hold on to the weights of a layer no longer."""
        release(self._layers[moe.layer].block)


class Removal:
    """Takes single experts out of a resident model for some of the passes that go through it."""

    def __init__(self, config: PretrainedConfig, device: torch.device | str = "cpu") -> None:
        self._blocks = ReducedBlocks(config, device) if routing_groups(config) == 1 else None

    def replaces(self, moe: MoELayer) -> bool:
        """Whether other experts take a removed one's place, as after pruning; else it is silenced."""
        return self._blocks is not None and bool(moe.block_path)

    @contextmanager
    def of(self, moe: MoELayer, removed: Callable[[], int | None]) -> Iterator[None]:
        """While this lasts, the layer runs without the expert that `removed` names whenever the layer is called."""
        blocks = self._blocks
        module: Any = moe.block if blocks is not None and self.replaces(moe) else moe.experts
        original = module.forward

        def replaced(*args: Any, **kwargs: Any) -> Any:
            expert = removed()
            if expert is None:
                return original(*args, **kwargs)
            assert blocks is not None
            reduced, numbers = blocks.borrow(moe, expert)
            with lending(reduced.experts, moe.experts, numbers):
                return reduced.block(*args, **kwargs)

        def silenced(*args: Tensor, **kwargs: Tensor) -> Any:
            hidden_TH, index_TK, gate_TK = (*args, *kwargs.values())
            expert = removed()
            gate_TK = gate_TK if expert is None else gate_TK.masked_fill(index_TK == expert, 0)
            return original(hidden_TH, index_TK, gate_TK)

        module.forward = replaced if module is moe.block else silenced
        try:
            yield
        finally:
            module.forward = original
            if module is moe.block and blocks is not None:
                blocks.forget(moe)


@contextmanager
def lending(borrower: Any, experts: Any, numbers: Tensor, outputs: list[Tensor] | None = None) -> Iterator[None]:
    """While this lasts, one experts module computes with the experts of another, which has them under `numbers`.

    What is computed is added to `outputs`.
    """
    original = borrower.forward

    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        hidden_TH, index_TK, gate_TK = (*args, *kwargs.values())
        own_TK = numbers.to(index_TK.device)[index_TK.clamp(max=len(numbers) - 1)]
        found = experts_forward(experts, hidden_TH, own_TK, gate_TK)
        if outputs is not None:
            outputs.append(found)
        return found

    borrower.forward = forward
    try:
        yield
    finally:
        borrower.forward = original
