"""The experts function that leaves slots out, against a loop in float64, and the rules that take slots out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OlmoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moe_compress.models import linear
from moe_compress.models.routing import Routing, Skip
from moe_compress.runtime import skipping
from moe_compress.runtime.routing import RoutingRules
from moe_compress.runtime.skipping import SKIPPING, skipping_forward

N, H, F, K = 6, 16, 8, 3


def olmoe() -> Any:
    return OlmoeExperts(OlmoeConfig(hidden_size=H, intermediate_size=F, num_experts=N, num_experts_per_tok=K))


def gpt_oss() -> Any:
    """Transposed, with biases, gate and up interleaved, an activation of its own."""
    return GptOssExperts(GptOssConfig(hidden_size=H, intermediate_size=F, num_local_experts=N, num_experts_per_tok=K))


def nemotron() -> Any:
    """No gate projection."""
    return NemotronHExperts(
        NemotronHConfig(hidden_size=H, moe_intermediate_size=F, n_routed_experts=N, num_experts_per_tok=K)
    )


MAKERS = {"olmoe": olmoe, "gpt_oss": gpt_oss, "nemotron_h": nemotron}


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    experts = MAKERS[name]()
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.5)
    return experts.to(dtype)


def routing(tokens: int, skipped: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, rows (N and beyond are no experts), gate values (some 0)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.stack([torch.randperm(N, generator=generator)[:K] for _ in range(tokens)])
    gate = torch.rand(tokens, K, generator=generator).to(dtype) + 0.1
    out = torch.rand(tokens, K, generator=generator) < skipped
    beyond = N + torch.randint(0, 3, (tokens, K), generator=generator)
    hidden_by_index = torch.rand(tokens, K, generator=generator) < 0.5
    return hidden, torch.where(out & hidden_by_index, beyond, index), gate.masked_fill(out & ~hidden_by_index, 0)


def looped(name: str, experts: Any, hidden: Tensor, index: Tensor, gate: Tensor) -> Tensor:
    """Token by token and slot by slot, from the formula of the family, in float64."""
    weights = {key: tensor.double() for key, tensor in experts.state_dict().items()}
    output = torch.zeros(hidden.shape, dtype=torch.float64)
    for token in range(len(hidden)):
        for expert, value in zip(index[token].tolist(), gate[token].tolist(), strict=True):
            if expert >= N or value == 0:
                continue
            x = hidden[token].double()
            if name == "olmoe":
                both = weights["gate_up_proj"][expert] @ x
                inner = both[:F] * torch.sigmoid(both[:F]) * both[F:]
                result = weights["down_proj"][expert] @ inner
            elif name == "gpt_oss":
                both = x @ weights["gate_up_proj"][expert] + weights["gate_up_proj_bias"][expert]
                left, right = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
                inner = (right + 1) * left * torch.sigmoid(1.702 * left)
                result = inner @ weights["down_proj"][expert] + weights["down_proj_bias"][expert]
            else:
                inner = (weights["up_proj"][expert] @ x).clamp(min=0) ** 2
                result = weights["down_proj"][expert] @ inner
            output[token] += value * result
    return output


@pytest.mark.parametrize("skipped", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 40, 300])
@pytest.mark.parametrize("name", MAKERS)
def test_output_is_that_of_the_slots_that_run(name: str, tokens: int, skipped: float) -> None:
    experts = made(name)
    inputs = routing(tokens, skipped, seed=tokens)
    with torch.no_grad():
        found = skipping_forward(experts, *inputs)
    expected = looped(name, experts, *inputs)
    assert found.dtype == torch.float32 and found.shape == (tokens, H)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skipped", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [2, 40, 300])
@pytest.mark.parametrize("name", MAKERS)
def test_large_experts_are_multiplied_one_by_one(
    name: str, tokens: int, skipped: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the tiny ones here where that is forced, by oneDNN where torch has it."""
    monkeypatch.setattr(skipping, "LARGE_EXPERT", 0)
    monkeypatch.setattr(linear, "LEAST_WORK", 0)
    monkeypatch.setattr(skipping, "_grouped_product", lambda *given, **options: pytest.fail("grouped"))
    experts, inputs = made(name), routing(tokens, skipped, seed=tokens)
    with torch.no_grad():
        found = skipping_forward(experts, *inputs)
    torch.testing.assert_close(found.double(), looped(name, experts, *inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 400])
@pytest.mark.parametrize("name", MAKERS)
def test_half_precision(name: str, tokens: int) -> None:
    experts = made(name, torch.bfloat16)
    hidden, index, gate = routing(tokens, 0.4, dtype=torch.bfloat16)
    expected = looped(name, experts, hidden, index, gate)
    with torch.no_grad():
        for gates in (gate, gate.float()):
            found = skipping_forward(experts, hidden, index, gates)
            assert found.dtype == torch.bfloat16
            assert float((found.double() - expected).abs().max() / expected.std()) < 0.1


@pytest.mark.parametrize("tokens", [1, 40])
def test_nothing_is_computed_for_skipped_rows(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every product, counted: as many as slots run."""
    rows = []
    experts = made("olmoe")
    apply_gate = experts._apply_gate
    monkeypatch.setattr(experts, "_apply_gate", lambda both: rows.append(len(both)) or apply_gate(both))
    hidden, index, gate = routing(tokens, 0.6, seed=1)
    with torch.no_grad():
        skipping_forward(experts, hidden, index, gate)
    running = int(((index < N) & (gate != 0)).sum())
    assert rows == [running] and 0 < running < tokens * K


@pytest.mark.parametrize(("tokens", "dtype"), [(12, torch.float32), (12, torch.float64), (1, torch.float32)])
@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_those_of_the_familys_own_code(name: str, tokens: int, dtype: torch.dtype) -> None:
    hidden, index, gate = routing(tokens, 0.0, dtype=dtype)
    drop = routing(tokens, 0.5, seed=3)[1] >= N
    gradients = []
    for own in (False, True):
        experts = made(name, dtype)
        inputs = hidden.clone().requires_grad_(), gate.masked_fill(drop, 0).requires_grad_()
        if own:
            experts.config._experts_implementation = "eager"
            output = experts(inputs[0], index, inputs[1])
        else:
            output = skipping_forward(experts, inputs[0], index.masked_fill(drop, N), inputs[1])
        (output * torch.linspace(-1, 1, H, dtype=dtype)).sum().backward()
        assert inputs[0].grad is not None and inputs[1].grad is not None
        of_weights = [weight.grad for weight in experts.parameters()]
        gradients.append([inputs[0].grad, inputs[1].grad.masked_fill(drop, 0), *of_weights])
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs is not None and bool(theirs.any())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_any_model_can_name_it() -> None:
    experts = made("olmoe")
    hidden, index, gate = routing(5, 0.0)
    experts.config._experts_implementation = SKIPPING
    assert ALL_EXPERTS_FUNCTIONS[SKIPPING] is skipping_forward
    with torch.no_grad():
        torch.testing.assert_close(
            experts(hidden, index, gate).double(), looped("olmoe", experts, hidden, index, gate), rtol=1e-4, atol=1e-5
        )


# ---------------------------------------------------------------------------------------------------------------- rules


def rules(num_groups: int = 1, **settings: Any) -> RoutingRules:
    return RoutingRules(Routing(**settings), N, num_groups)


def test_largest_gate_values_run_and_stay_as_they_are() -> None:
    index, gate = torch.tensor([[4, 1, 2], [0, 5, 3]]), torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]])
    found = rules(top_k=2, normalise_over=3).apply(index, gate)
    assert found[0].tolist() == [[N, 1, 2], [0, 5, N]]
    torch.testing.assert_close(found[1], torch.tensor([[0, 0.5, 0.3], [0.4, 0.4, 0]]))


def test_zero_experts_of_groups_are_no_experts() -> None:
    """Rows 0 1 2 [3] | 4 5 6 [7] of two groups: experts 0 1 2 | 3 4 5, zero experts in brackets, 8 is beyond all."""
    index = torch.tensor([[0, 2, 3], [4, 6, 7], [5, 1, 8]])
    found, gate = rules(2, zero_experts=2).apply(index, torch.full((3, 3), 0.3))
    assert found.tolist() == [[0, 2, N], [3, 5, N], [4, 1, N]]
    torch.testing.assert_close(gate, torch.tensor([[0.3, 0.3, 0], [0.3, 0.3, 0], [0.3, 0.3, 0]]))


def test_slots_below_the_threshold_are_skipped() -> None:
    index, gate = torch.tensor([[4, 1, 2], [0, 5, 3]]), torch.tensor([[0.8, 0.33, 0.31], [0.1, 0.2, 0.3]])
    found = rules(skip=Skip(0.4)).apply(index, gate)
    assert found[0].tolist() == [[4, 1, N], [N, 5, 3]]
    torch.testing.assert_close(found[1], torch.tensor([[0.8, 0.33, 0], [0, 0.2, 0.3]]))
    scaled = rules(skip=Skip(0.4, renormalise=True)).apply(index, gate)[1]
    torch.testing.assert_close(scaled.sum(dim=1), gate.sum(dim=1))
    torch.testing.assert_close(scaled[0, 0] / scaled[0, 1], torch.tensor(0.8 / 0.33))


def test_protected_tokens_skip_nothing() -> None:
    index, gate = torch.tensor([[4, 1, 2], [0, 5, 3]]), torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1]])
    found = rules(skip=Skip(0.4, protect=0.5))
    found.protected_T = torch.tensor([False, True])
    assert found.apply(index, gate)[0].tolist() == [[4, N, N], [0, 5, 3]]


def test_zero_experts_are_not_compared_by_the_threshold() -> None:
    """The largest gate value is that of an expert that runs."""
    index, gate = torch.tensor([[N, 1, 2]]), torch.tensor([[0.9, 0.3, 0.2]])
    found = rules(zero_experts=2, skip=Skip(0.5)).apply(index, gate)
    assert found[0].tolist() == [[N, 1, 2]]
