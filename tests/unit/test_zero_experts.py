"""Zero experts: how many, how their rows are drawn, and the losses that make routers use them, against the formulas."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_compress.compress.distill.balance import SkipTarget
from moe_compress.compress.zero_experts.apply import with_zero_rows
from moe_compress.compress.zero_experts.config import ZeroExpertsConfig
from moe_compress.compress.zero_experts.losses import expert_balance_loss, group_balance_loss
from moe_compress.compress.zero_experts.plan import LayerFacts, balance_weight, plan_zero_experts
from moe_compress.errors import UsageError
from moe_compress.models.layers import MoELayer
from moe_compress.models.routing import router_rows
from moe_compress.runtime.trace import RouterPass

N, Z, K, T = 12, 6, 4, 200


def config(**settings: Any) -> ZeroExpertsConfig:
    return ZeroExpertsConfig.model_validate({"op": "zero_experts"} | settings)


def layer(num_experts: int, num_groups: int = 1) -> MoELayer:
    """Of its numbers alone."""
    return MoELayer(3, "", "", "", nn.Module(), nn.Module(), num_experts, 2, {}, num_groups=num_groups)


# ----------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize(
    ("count", "experts", "groups", "expected"),
    [(0.5, 128, 1, 64), (0.5, 5, 1, 3), (0.1, 4, 1, 1), (1, 64, 1, 1), (1.0, 64, 1, 64), (0.5, 256, 8, 128),
     (0.3, 16, 4, 4), (0.01, 16, 4, 4), (12, 16, 4, 12), (2.0, 8, 1, 16)],
)  # fmt: skip
def test_counts(count: float, experts: int, groups: int, expected: int) -> None:
    plan = plan_zero_experts(config(count=count), [LayerFacts(1, experts, 2), LayerFacts(4, experts, 2)], groups)
    assert [(found.layer, found.zero_experts) for found in plan.layers] == [(1, expected), (4, expected)]
    assert plan.untrained_skip == pytest.approx(expected / (experts + expected))
    assert json.loads(json.dumps(plan.to_json()))["layers"][1]["zero_experts"] == expected


def test_half_of_them_by_default() -> None:
    (found,) = plan_zero_experts(config(), [LayerFacts(0, 128, 8)]).layers
    assert found.zero_experts == 64


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(UsageError, match="count: 4 or 8"):
        plan_zero_experts(config(count=6), [LayerFacts(0, 16, 2)], 4)
    with pytest.raises(UsageError, match="count: 4"):
        plan_zero_experts(config(count=3), [LayerFacts(0, 16, 2)], 4)
    with pytest.raises(UsageError, match="layer 0 has 8 zero experts already"):
        plan_zero_experts(config(), [LayerFacts(0, 16, 2, 8)])


@pytest.mark.parametrize("wrong", [0, -1, -0.5, True, "half", float("inf"), None])
def test_wrong_counts_are_one_sentence(wrong: Any) -> None:
    with pytest.raises(ValueError, match="should be a fraction of the routed experts") as caught:
        config(count=wrong)
    assert len(caught.value.errors()) == 1  # type: ignore[attr-defined]


def test_balance_weight_is_the_papers() -> None:
    assert balance_weight(0.5, 128, 64) == 2.0
    for r in (0.25, 0.5, 0.75):
        w = balance_weight(r, N, Z)
        assert w == pytest.approx(r / (1 - r) * N / Z)
        assert w * Z / (N + w * Z) == pytest.approx(r)


# ----------------------------------------------------------------------------------------------------------------- rows


def test_rows_of_one_group_follow_the_experts() -> None:
    assert router_rows(4, 2, 1) == ([0, 1, 2, 3], [4, 5])


def test_every_group_ends_with_its_own() -> None:
    assert router_rows(6, 4, 2) == ([0, 1, 2, 5, 6, 7], [3, 4, 8, 9])


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("groups", [1, 2])
def test_rows_are_drawn_from_each_coordinates_mean_and_deviation(dimension: int, groups: int) -> None:
    torch.manual_seed(0)
    routed = torch.randn(8, 5) * torch.tensor([0.1, 1.0, 3.0, 0.5, 2.0]) + torch.tensor([5.0, -1.0, 0.0, 2.0, -3.0])
    beyond = torch.full((1, 5), 77.0)
    tensor = torch.cat([routed, beyond]).movedim(0, dimension).contiguous()
    count = 8000
    wider = with_zero_rows(
        tensor, dimension, layer(8, groups), count, config(), np.random.default_rng(1), torch.float32
    )
    rows = wider.movedim(dimension, 0)
    size = (8 + count) // groups
    own = [row for row in range(8 + count) if row % size < 8 // groups]
    assert torch.equal(rows[own], routed), "originals are bit for bit"
    assert torch.equal(rows[8 + count :], beyond), "what follows stays last"
    new = rows[sorted(set(range(8 + count)) - set(own))].double()
    mean, deviation = routed.double().mean(0), routed.double().std(0)  # of a sample
    standard = (new - mean) / deviation
    assert standard.mean(0).abs().max() < 5 / count**0.5
    assert (standard.std(0) - 1).abs().max() < 5 / (2 * count) ** 0.5
    assert np.corrcoef(standard.numpy().T)[~np.eye(5, dtype=bool)].max() < 5 / count**0.5, "coordinate by coordinate"
    assert (standard.abs() < 1).double().mean() == pytest.approx(0.6827, abs=0.01), "normal"


def test_biases_are_drawn_as_numbers() -> None:
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0])
    wider = with_zero_rows(bias, 0, layer(4), 4000, config(), np.random.default_rng(0), torch.float32)
    assert torch.equal(wider[:4], bias)
    assert float(wider[4:].mean()) == pytest.approx(2.5, abs=0.1)
    assert float(wider[4:].std()) == pytest.approx(np.std([1, 2, 3, 4], ddof=1), abs=0.1)


def test_drawn_values_are_exact_in_the_stored_type_and_depend_on_the_seed() -> None:
    tensor = torch.randn(4, 3).bfloat16().float()
    draws = [
        with_zero_rows(tensor, 0, layer(4), 3, config(), np.random.default_rng(seed), torch.bfloat16)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0], draws[0].bfloat16().float())


def test_tiled_rows_are_the_originals() -> None:
    tensor = torch.randn(4, 3)
    wider = with_zero_rows(tensor, 0, layer(4), 6, config(init="tile"), np.random.default_rng(0), torch.float32)
    assert torch.equal(wider, torch.cat([tensor, tensor, tensor[:2]]))


# --------------------------------------------------------------------------------------------------------------- losses

ZERO = torch.arange(N + Z) >= N


def by_formula(probability: np.ndarray, rows: np.ndarray, weight: float, alpha: float) -> float:
    """alpha (N + w Z) / K [f_E P_E / N + f_Z P_Z / (w Z)], token by token, slot by slot."""
    f = np.zeros(N + Z)
    for slots in rows:
        for row in slots:
            f[row] += 1 / len(rows)
    p = np.zeros(N + Z)
    for token in probability:
        p += token / len(probability)
    bracket = f[:N].sum() * p[:N].sum() / N + f[N:].sum() * p[N:].sum() / (weight * Z)
    return float(alpha * (N + weight * Z) / rows.shape[1] * bracket)


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    """Router logits [T, N + Z] and the rows with the K largest."""
    logits = torch.randn(T, N + Z, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return logits, logits.topk(K).indices


@pytest.mark.parametrize(("weight", "alpha"), [(2.0, 0.1), (0.7, 1.0), (6.0, 0.01)])
def test_group_loss_is_the_formula(weight: float, alpha: float) -> None:
    logits, rows = drawn(0)
    probability = logits.softmax(dim=1)
    found = group_balance_loss(probability, ZERO, ZERO[rows], weight, alpha)
    assert float(found) == pytest.approx(by_formula(probability.numpy(), rows.numpy(), weight, alpha), rel=1e-12)


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
def test_group_loss_is_alpha_where_the_target_is_met(target: float) -> None:
    """Whatever the balance inside the groups."""
    slots = torch.zeros(T, K, dtype=torch.bool).flatten()
    slots[torch.randperm(T * K)[: round(target * T * K)]] = True
    inside = torch.rand(T, N + Z, dtype=torch.float64)
    routed, zero = inside * ~ZERO, inside * ZERO
    probability = (1 - target) * routed / routed.sum(1, keepdim=True) + target * zero / zero.sum(1, keepdim=True)
    weight = balance_weight(target, N, Z)
    for alpha in (0.1, 0.3):
        loss = group_balance_loss(probability, ZERO, slots.view(T, K), weight, alpha)
        assert float(loss) == pytest.approx(alpha, rel=1e-12)


def test_gradient_of_the_group_loss_matches_finite_differences() -> None:
    logits, rows = drawn(1)
    logits.requires_grad_()
    skipped = ZERO[rows]
    group_balance_loss(logits.softmax(dim=1), ZERO, skipped, 2.0).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    step = 1e-6
    for token, row in [(0, 0), (5, N), (17, N - 1), (T - 1, N + Z - 1)]:
        around = []
        for sign in (1, -1):
            moved = logits.detach().clone()
            moved[token, row] += sign * step
            around.append(float(group_balance_loss(moved.softmax(dim=1), ZERO, skipped, 2.0)))
        assert float(logits.grad[token, row]) == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-5)


def test_only_the_group_matters_to_the_gradient() -> None:
    """Inside a group every row's probability is pushed alike: a trained balance of experts is left alone."""
    logits, rows = drawn(2)
    probability = logits.softmax(dim=1).requires_grad_()
    group_balance_loss(probability, ZERO, ZERO[rows], 2.0).backward()  # type: ignore[no-untyped-call]
    assert probability.grad is not None
    for group in (ZERO, ~ZERO):
        assert len(probability.grad[:, group].unique()) == 1


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
def test_descending_the_group_loss_ends_at_the_target(target: float) -> None:
    """Routers that sample K rows by their probabilities: f = K P, and the loss rests at r = w Z / (N + w Z)."""
    weight = balance_weight(target, N, Z)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)  # of the zero experts' logits
    logits, _ = drawn(3)
    losses, skips = [], []
    for _ in range(400):
        probability = (logits + shift * ZERO).softmax(dim=1)
        p_zero = float(probability[:, ZERO].detach().sum(dim=1).mean())
        skipped = torch.zeros(10_000 * K, dtype=torch.bool)
        skipped[: round(p_zero * len(skipped))] = True
        loss = group_balance_loss(probability, ZERO, skipped.view(-1, K), weight, alpha=1.0)
        (gradient,) = torch.autograd.grad(loss, shift)
        shift = (shift - 0.5 * gradient).detach().requires_grad_()
        losses.append(float(loss.detach()))
        skips.append(p_zero)
    assert skips[-1] == pytest.approx(weight * Z / (N + weight * Z), abs=1e-3)
    assert losses[-1] == pytest.approx(1.0, abs=1e-3) and losses[0] > 1.01
    assert all(later <= earlier + 1e-4 for earlier, later in pairwise(losses))


def balance_by_formula(probability: Tensor, rows: Tensor, weight: float) -> Tensor:
    """(N + w Z) sum_r share_r p_r / w_r over a whole batch, row by row."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(N + Z):
        share = sum(slot == row for slot in rows.flatten().tolist()) / rows.numel()
        total = total + share * probability[:, row].mean() / (weight if row >= N else 1)
    return (N + weight * Z) * total


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_expert_loss_is_the_formula_however_the_batch_is_divided(weight: float) -> None:
    """Value and gradient, from shares of the whole batch."""
    logits, rows = drawn(4)
    logits.requires_grad_()
    expected = balance_by_formula(logits.softmax(dim=1), rows, weight)
    (wanted,) = torch.autograd.grad(expected, logits)
    share = torch.bincount(rows.flatten(), minlength=N + Z).double() / rows.numel()
    for sizes in ([T], [T // 4, T - T // 4], [1] * T):
        parts = logits.split(sizes)
        losses = [len(part) / T * expert_balance_loss(part.softmax(dim=1), share, ZERO, weight) for part in parts]
        found = torch.stack(losses).sum()
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
        torch.testing.assert_close(torch.autograd.grad(found, logits)[0], wanted)


def test_gradient_of_the_expert_loss_matches_finite_differences() -> None:
    logits, rows = drawn(5)
    share = torch.bincount(rows.flatten(), minlength=N + Z).double() / rows.numel()
    assert torch.autograd.gradcheck(
        lambda given: expert_balance_loss(given.softmax(dim=1), share, ZERO, 2.0), logits.requires_grad_()
    )


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
def test_expert_loss_is_one_where_each_takes_its_part(target: float) -> None:
    part = torch.where(ZERO, target / Z, (1 - target) / N).double()
    loss = expert_balance_loss(part.repeat(5, 1), part, ZERO, balance_weight(target, N, Z))
    assert float(loss) == pytest.approx(1.0)


@pytest.mark.parametrize("null_experts", [0, 1])
def test_the_loss_is_1_where_the_target_is_met_with_null_experts_of_the_family_too(null_experts: int) -> None:
    """Four experts and two zero experts; half of the scores and of the slots are theirs and the null experts'."""
    routing = SimpleNamespace(zero_experts=2)
    moe: Any = SimpleNamespace(num_experts=4, num_groups=1, routing=routing, layer=0)
    rows = 6 + null_experts
    share_R = torch.tensor([0.125] * 4 + [0.5 / (rows - 4)] * (rows - 4))
    row_TK = torch.tensor([[0, 4], [1, 5], [2, 4], [3, rows - 1]])
    found = RouterPass(moe, share_R.log().expand(4, -1), row_TK, share_R[row_TK])
    assert SkipTarget([moe], 0.5).layer_loss(found).item() == pytest.approx(1)
