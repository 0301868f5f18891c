"""Second moments from passes that wait inside a layer, against the inputs seen in the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compress.compress.quantize import moments as moments_module
from moe_compress.compress.quantize.moments import Moments
from moe_compress.compress.quantize.shapes import LinearLayer, linear_layers
from moe_compress.models.experts import IMPLEMENTATION
from moe_compress.models.layers import MoELayer, decoder_layers, find_moe_layers
from moe_compress.models.lockstep import Lockstep
from tests.tiny_checkpoint import VOCABULARY, tiny_model


class Model:
    """One layer, its experts, its attention, the probe and calibration batches."""

    def __init__(self) -> None:
        self.model: Any = tiny_model(num_hidden_layers=1, num_experts=4)
        self.model.set_experts_implementation(IMPLEMENTATION)
        self.layers = decoder_layers(self.model)[1]
        self.layer: Any = self.layers[0]
        self.moe: MoELayer = find_moe_layers(self.model)[0]
        self.linears = [one for one in linear_layers(self.layers, {0: self.moe}) if one.part == "attention"]
        generator = torch.Generator().manual_seed(0)
        self.probe = torch.randint(VOCABULARY, (1, 30), generator=generator)
        self.batches = list(torch.randint(VOCABULARY, (4, 5, 60), generator=generator))

    def show(self, module: Any, look: Callable[..., None]) -> None:
        """Show `look` a module's inputs in the model's own passes of the calibration batches."""
        handle = module.register_forward_pre_hook(lambda module, inputs: look(*inputs))
        with torch.no_grad():
            for batch in self.batches:
                self.model(input_ids=batch, use_cache=False)
        handle.remove()

    def mean_of(self, linear: LinearLayer) -> Tensor:
        found: list[Tensor] = []
        self.show(self.layer.get_submodule(linear.path), lambda inputs: found.append(inputs.flatten(0, 1)))
        rows = torch.cat(found).double()
        return rows.T @ rows / len(rows)

    def tokens_of_experts(self) -> list[int]:
        found: list[int] = []
        self.show(self.moe.experts, lambda hidden, index_TK, gate: found.extend(index_TK.flatten().tolist()))
        return [found.count(expert) for expert in range(4)]

    def means_of_experts(self, name: str) -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in range(4)]
        experts: Any = self.moe.experts

        def look(hidden_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> None:
            for token, chosen in enumerate(index_TK.tolist()):
                for expert in chosen:
                    row = hidden_TH[token]
                    if name == "down_proj":
                        gate, up = (experts.gate_up_proj[expert] @ row).chunk(2)
                        row = torch.nn.functional.silu(gate) * up
                    found[expert].append(row)

        self.show(experts, look)
        stacked = [torch.stack(rows).double() for rows in found]
        return [rows.T @ rows / len(rows) for rows in stacked]


def coarsen(weight: Tensor) -> None:
    """Change a weight as rounding would."""
    weight.data.copy_((weight.data * 20).round() / 20)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("held", ["all", "some", "none"])
def test_every_matrix_sees_what_the_quantized_ones_before_it_give(held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Model()
    limit, waiting = {"all": (1 << 30, 5), "some": (500_000, 2), "none": (0, 0)}[held]
    monkeypatch.setattr(moments_module, "HELD_BYTES", limit)
    run = Lockstep(one.model, one.layers, [one.probe, *one.batches])
    calls = []
    counting = one.layer.self_attn.k_proj.register_forward_hook(lambda *arguments: calls.append(1))
    moments = Moments(run, 0, one.layer, one.moe, one.linears)
    order = moments.order()
    assert [group and [linear.path.split(".")[1] for linear in group] for group in order] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], None,
    ]  # fmt: skip
    assert len(calls) == 1, "the order is the probe's"
    counting.remove()
    found: list[tuple[Tensor, Tensor]] = []
    # The model's own passes need its own forward, which the lockstep has wrapped; they are compared afterwards, on the
    # weights as they were at the time.
    states = []
    for group in order:
        if group is not None:
            states.append((group[0], None, {k: v.clone() for k, v in one.layer.state_dict().items()}))
            found.append((moments.linear(group[0]), torch.empty(0)))
            for linear in group:
                coarsen(one.layer.get_submodule(linear.path).weight)
            continue
        for name in ("gate_up_proj", "down_proj"):
            states.append((None, name, {k: v.clone() for k, v in one.layer.state_dict().items()}))
            matrices = [moments.experts(name, members)[0] for members in ([0, 2], [1, 3])]
            found.append((matrices[0], matrices[1]))
            coarsen(getattr(one.moe.experts, name))
    assert len(moments._waiting) == waiting
    moments.close()
    run.through(0)
    logits = run.finish()
    quantized = {k: v.clone() for k, v in one.layer.state_dict().items()}
    for (linear, name, state), (first, second) in zip(states, found, strict=True):
        one.layer.load_state_dict(state)
        if linear is not None:
            close(first[0], one.mean_of(linear))
        else:
            assert name is not None
            expected = one.means_of_experts(name)
            for matrix, expert in zip([*first, *second], (0, 2, 1, 3), strict=True):
                close(matrix, expected[expert])
    one.layer.load_state_dict(quantized)
    with torch.no_grad():
        expected = [one.model(input_ids=batch, use_cache=False).logits for batch in (one.probe, *one.batches)]
    assert all(torch.equal(after, own) for after, own in zip(logits, expected, strict=True))


@pytest.mark.parametrize(("held_bytes", "times"), [(1 << 30, 1), (0, 4)])
def test_nothing_is_computed_twice_while_there_is_memory(
    held_bytes: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies between q_proj and o_proj runs once, or for o_proj, for both matrices of the experts, and to pass."""
    one = Model()
    monkeypatch.setattr(moments_module, "HELD_BYTES", held_bytes)
    run = Lockstep(one.model, one.layers, [one.probe, *one.batches])
    moments = Moments(run, 0, one.layer, one.moe, one.linears)
    order = moments.order()
    calls: list[int] = []
    counting = one.layer.self_attn.q_norm.register_forward_hook(lambda *arguments: calls.append(run.batch))
    for group in order:
        if group is not None:
            moments.linear(group[0])
            continue
        for name in ("gate_up_proj", "down_proj"):
            moments.experts(name, list(range(4)))
    moments.close()
    run.through(0)
    run.close()
    counting.remove()
    assert sorted(calls) == sorted(list(range(5)) * times)


def test_starved_experts_are_named_and_share_the_layers_pool() -> None:
    one = Model()
    run = Lockstep(one.model, one.layers, [one.probe, one.batches[0][:1]])
    moments = Moments(run, 0, one.layer, one.moe, [])
    assert moments.order() == [None]
    (first,), few = moments.experts("gate_up_proj", [1])
    assert few == [1]
    together, few = moments.experts("gate_up_proj", [1, 3])
    assert few == [1, 3] and torch.equal(together[0], first)
    moments.close()
    run.close()
    one.batches = [one.batches[0][:1]]
    own = one.means_of_experts("gate_up_proj")
    sizes = [mean.diagonal().mean() for mean in own]
    pool = sum(mean / size for mean, size in zip(own, sizes, strict=True)) / 4
    tokens = one.tokens_of_experts()
    assert sum(tokens) == 120 and max(tokens) < 128
    for found, expert in zip(together, (1, 3), strict=True):
        share = tokens[expert] / 128
        close(found, share * own[expert] + (1 - share) * sizes[expert] * pool)


def test_what_is_used_without_being_called_comes_first_and_without_statistics() -> None:
    """Passes that wait further on would have used it as it was before."""
    one = Model()
    attention = one.layer.self_attn
    attention.o_proj.forward = lambda inputs: inputs @ attention.other.weight.T
    attention.other = torch.nn.Linear(32, 32, bias=False)
    paths = ("q_proj", "o_proj", "other")
    linears = [LinearLayer(0, f"self_attn.{path}", "attention", (32, 32)) for path in paths]
    run = Lockstep(one.model, one.layers, [one.probe, *one.batches])
    moments = Moments(run, 0, one.layer, one.moe, linears)
    assert moments.order() == [[linears[2]], [linears[0]], [linears[1]], None]
    assert not moments.linear(linears[2]).any()
    moments.close()
    run.close()
