"""Experts by neuron, their alignment and their averages; on a module of every layout that families have."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from moe_compress.compress.merge import align
from moe_compress.compress.merge.average import average
from moe_compress.compress.merge.neurons import Expert, inner_activations, read_expert, write_expert
from moe_compress.models.experts import whole_expert

HIDDEN, NEURONS, EXPERTS = 12, 8, 4
LAYOUTS = {
    "plain": {},
    "no gate": {"has_gate": False},
    "transposed, interleaved, biases": {"is_transposed": True, "is_concatenated": False, "has_bias": True},
    "transposed": {"is_transposed": True},
    "biases": {"has_bias": True},
}


def make_experts(layout: str) -> Any:
    """A random fused experts module; its own forward pass is not used."""
    flags = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(len(layout))

    def random(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=generator), requires_grad=False)

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, ACT2FN["silu"]
            wide = NEURONS if flags.get("has_gate") is False else 2 * NEURONS
            name = "up_proj" if flags.get("has_gate") is False else "gate_up_proj"
            first, second = (wide, HIDDEN), (HIDDEN, NEURONS)
            if flags.get("is_transposed"):
                first, second = first[::-1], second[::-1]
            self.register_parameter(name, random(EXPERTS, *first))
            self.down_proj = random(EXPERTS, *second)
            if flags.get("has_bias"):
                self.register_parameter(f"{name}_bias", random(EXPERTS, wide))
                self.down_proj_bias = random(EXPERTS, HIDDEN)

        def _apply_gate(self, mixed: Tensor) -> Tensor:
            both = mixed.chunk(2, dim=-1) if flags.get("is_concatenated", True) else (mixed[..., ::2], mixed[..., 1::2])
            return self.act_fn(both[0]) * both[1]

        def forward(self, *inputs: Any) -> None:
            raise NotImplementedError

    return use_experts_implementation(Experts, **flags)(None)


@pytest.fixture(params=LAYOUTS)
def experts(request: pytest.FixtureRequest) -> Any:
    return make_experts(request.param)


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(9))


def output(experts: Any, expert: Expert, inputs: Tensor) -> Tensor:
    """What an expert computes, from its parts."""
    found = inner_activations(experts, expert, inputs) @ expert.parts["down_proj"]
    return found if expert.offset is None else found + expert.offset


def test_parts_compute_what_the_module_does(experts: Any, inputs: Tensor) -> None:
    for number in range(EXPERTS):
        expected = whole_expert(experts, number, inputs)
        found = output(experts, read_expert(experts, number), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_permuted_expert_is_the_same_function(experts: Any, inputs: Tensor) -> None:
    order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(1))
    before = whole_expert(experts, 2, inputs)
    expert = read_expert(experts, 2)
    write_expert(experts, 1, expert.permuted(order))
    torch.testing.assert_close(whole_expert(experts, 1, inputs), before, rtol=1e-4, atol=1e-4)
    write_expert(experts, 1, expert)
    for name, tensor in experts.named_parameters():
        assert torch.equal(tensor[1], tensor[2]), name


def test_a_hidden_permutation_is_recovered(experts: Any, inputs: Tensor) -> None:
    order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(2))
    reference = read_expert(experts, 0)
    other = reference.permuted(order)
    by_weights = align.by_weights(reference.rows_FD, other.rows_FD)
    by_activations = align.by_activations(
        inner_activations(experts, reference, inputs), inner_activations(experts, other, inputs)
    )
    for found in (by_weights, by_activations):
        assert torch.equal(order[found], torch.arange(NEURONS))
        for name, part in other.permuted(found).parts.items():
            assert torch.equal(part, reference.parts[name])


def test_assignment_by_weights_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(3)
    reference, other = torch.randn(6, 9, generator=generator), torch.randn(6, 9, generator=generator)

    def distance(order: Any) -> float:
        return float((reference.double() - other.double()[list(order)]).square().sum())

    best = min(permutations(range(6)), key=distance)
    assert align.by_weights(reference, other).tolist() == list(best)


def test_assignment_by_activations_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(4)
    reference, other = torch.randn(30, 5, generator=generator), torch.randn(30, 5, generator=generator)
    other[:, 2] = 0.5  # never varies
    correlation = torch.corrcoef(torch.cat([reference, other], dim=1).double().T)[:5, 5:].nan_to_num()

    def total(order: Any) -> float:
        return float(correlation[range(5), list(order)].sum())

    assert align.by_activations(reference, other).tolist() == list(max(permutations(range(5)), key=total))


def test_averages(experts: Any) -> None:
    read = [read_expert(experts, number) for number in range(3)]
    same = average([read[0]] * 3, (0.2, 0.3, 0.5))
    for name, part in same.parts.items():
        torch.testing.assert_close(part, read[0].parts[name], rtol=0, atol=1e-7)
    mixed = average(read, (0.5, 0.25, 0.25))
    for name, part in mixed.parts.items():
        expected = 0.5 * read[0].parts[name] + 0.25 * read[1].parts[name] + 0.25 * read[2].parts[name]
        torch.testing.assert_close(part, expected)
    if mixed.offset is not None:
        offsets = [one.offset for one in read if one.offset is not None]
        torch.testing.assert_close(mixed.offset, 0.5 * offsets[0] + 0.25 * (offsets[1] + offsets[2]))
