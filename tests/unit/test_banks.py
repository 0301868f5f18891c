"""Banked experts against loops in float64: maps, constants, differences, in every layout and implementation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compress.compress.merge.neurons import Expert, inner_activations, read_expert
from moe_compress.models.experts import IMPLEMENTATION
from moe_compress.runtime.banks import Bank, furnish, part_shapes, run_banked, share, short
from tests.unit.test_merge_neurons import HIDDEN, LAYOUTS, NEURONS, make_experts

ROUTED = 6
TOP_K = 3


def bank(kind: str) -> Bank:
    if kind == "map":
        return Bank(4, (3, 0, 0, 1, 2, 3))
    if kind == "constants":
        return Bank(4, (3, None, 0, 1, 2, None))
    ranks = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (0, 2, 1, 3, 0, 2))
    return Bank(4, (3, 0, 0, 1, 2, 3), ranks)


def make(kind: str, layout: str, implementation: str) -> Any:
    """A banked module with random contents."""
    experts = make_experts(layout)
    experts.config = SimpleNamespace(_experts_implementation=implementation)
    found = bank(kind)
    if found.ranks:
        found = Bank(found.experts, found.slots, {part: found.ranks[part] for part in part_shapes(experts)})
    values = {name: tensor.data for name, tensor in experts.named_parameters()}
    furnish(experts, found)
    for name, value in values.items():
        experts.get_parameter(name).data = value
    generator = torch.Generator().manual_seed(7)
    for name, tensor in experts.named_parameters():
        if name not in values:
            tensor.data = torch.randn(tensor.shape, generator=generator)
    run_banked(experts)
    return experts


def routed_expert(experts: Any, expert: int) -> Expert:
    """The dense matrices of a routed expert that is no constant."""
    slot = experts.bank.slots[expert]
    stored = read_expert(experts, slot)
    if experts.differences is None:
        return stored
    parts, own = dict(stored.parts), dict(experts.differences.named_parameters())
    for part in part_shapes(experts):
        ranks = experts.bank.ranks[part]
        rows = slice(sum(ranks[:expert]), sum(ranks[: expert + 1]))
        low = own[f"{short(part)}_left"][rows].T @ own[f"{short(part)}_right"][rows]
        scale = own[f"{short(part)}_scale"][expert]
        parts[part] = scale * parts[part] + (low.T if part == "down_proj" else low)
    offset = stored.offset
    if experts.has_bias:
        bias = own["gate_up_proj_bias"][expert]
        gate, up = bias.chunk(2) if experts.is_concatenated else (bias[::2], bias[1::2])
        parts |= {"gate_proj_bias": gate[:, None], "up_proj_bias": up[:, None]}
        offset = own["down_proj_bias"][expert]
    return Expert(parts, offset)


def expected(experts: Any, hidden_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """Token by token, expert by expert, with dense matrices."""
    found = torch.zeros_like(hidden_TH)
    for token, (experts_K, gates_K) in enumerate(zip(index_TK.tolist(), gate_TK, strict=True)):
        for expert, gate in zip(experts_K, gates_K, strict=True):
            if experts.bank.slots[expert] is None:
                output = experts.constants[experts.bank.constants.index(expert)]
            else:
                dense = routed_expert(experts, expert)
                inner = inner_activations(experts, dense, hidden_TH[token : token + 1])
                output = (inner @ dense.parts["down_proj"])[0]
                output = output if dense.offset is None else output + dense.offset
            found[token] += gate * output
    return found


@pytest.fixture
def call() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, choices (some with two experts of one slot) and gate values."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(17, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(ROUTED, generator=generator)[:TOP_K] for _ in range(17)])
    return hidden, index, torch.rand(17, TOP_K, generator=generator)


@pytest.mark.parametrize("implementation", [IMPLEMENTATION, "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["map", "constants", "differences"])
@torch.no_grad()
def test_against_dense_experts(kind: str, layout: str, implementation: str, call: Any) -> None:
    experts = make(kind, layout, implementation)
    torch.testing.assert_close(experts(*call), expected(experts, *call), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["map", "constants", "differences"])
@torch.no_grad()
def test_choices_that_are_no_expert_cost_nothing(kind: str, call: Any) -> None:
    """A gate value of zero, and an index beyond the routed experts."""
    hidden, index, gate = call
    experts = make(kind, "plain", IMPLEMENTATION)
    gate[:, 0] = 0
    with_two = expected(experts, hidden, index, gate)
    torch.testing.assert_close(experts(hidden, index, gate), with_two, rtol=1e-4, atol=1e-3)
    index[:, 0] = ROUTED
    torch.testing.assert_close(experts(hidden, index, gate), with_two, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["map", "differences"])
@torch.no_grad()
def test_an_observer_sees_slots(kind: str, call: Any) -> None:
    hidden, index, gate = call
    experts = make(kind, "plain", IMPLEMENTATION)
    seen: dict[int, int] = {}
    blocks: list[Tensor] = []

    class Observer:
        def expert(self, expert: int, token_N: Tensor, gate_N: Tensor, output_NH: Tensor) -> None:
            assert len(token_N) == len(gate_N) == len(output_NH)
            seen[expert] = len(token_N)

        def block(self, index_TK: Tensor, routed_TH: Tensor) -> None:
            blocks.extend([index_TK, routed_TH])

    experts.observer = Observer()
    routed = experts(hidden, index, gate)
    slots = torch.tensor(experts.bank.slots)[index]
    assert seen == {slot: int((slots == slot).sum()) for slot in range(4)}
    assert torch.equal(blocks[0], slots) and torch.equal(blocks[1], routed)


@torch.no_grad()
def test_the_dominant_product_is_computed_once_for_tokens_of_a_slot(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense matrices of members are never built, and tokens that chose two members enter the first product once."""
    hidden, index, gate = call
    experts = make("differences", "plain", IMPLEMENTATION)
    dense: list[tuple[int, tuple[int, ...]]] = []

    def counted(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        dense.append((len(inputs), tuple(weight.shape)))
        return torch.nn.functional.linear(inputs, weight, bias)

    monkeypatch.setattr("moe_compress.runtime.banks.linear", counted)
    experts(hidden, index, gate)
    slots = torch.tensor(experts.bank.slots)[index]
    first = [count for count, shape in dense if shape == (2 * NEURONS, HIDDEN)]
    assert first == [int((slots == slot).any(dim=1).sum()) for slot in range(4)]
    assert sum(first) < index.numel(), "some token chose two members of a slot"
    assert len(dense) == 8


def test_shared_experts_are_the_same_tensors() -> None:
    owner, user = make("map", "plain", IMPLEMENTATION), make("differences", "plain", IMPLEMENTATION)
    share(user, owner)
    assert user.gate_up_proj is owner.gate_up_proj and user.down_proj is owner.down_proj
    assert user.differences is not None and owner.differences is None


@pytest.mark.parametrize("kind", ["map", "constants", "differences"])
def test_descriptions_go_both_ways(kind: str) -> None:
    for found in (bank(kind), Bank(5, (0, 1, 2, 3, 4), layer=3)):
        assert Bank.from_json(found.to_json()) == found
    assert Bank(2, (0, 1), layer=3).to_json() == {"experts": 2, "layer": 3}
    assert bank("constants").constants == [1, 5]
