"""Samples, costs of matching and fitted experts, against loops and least squares written out."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_compress.compress.merge.low_rank import best_scale, best_successor
from moe_compress.compress.merge.neurons import Expert, inner_activations, read_expert, write_expert
from moe_compress.compress.sampling import EvenSample
from moe_compress.compress.tie.costs import by_output, by_weights
from moe_compress.compress.tie.fit import PENALTIES, Tokens, closed_form, fit_expert
from moe_compress.compress.tie.losses import rank_errors
from moe_compress.compress.tie.samples import ExpertSamples, Sample, load_samples
from moe_compress.compress.tie.weighting import token_weights
from moe_compress.models.experts import whole_expert
from tests.unit.test_merge_neurons import EXPERTS, HIDDEN, LAYOUTS, NEURONS, make_experts


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def samples(seed: int, counts: tuple[int, ...] = (40, 7, 0, 25)) -> list[Sample]:
    return [Sample(random(n, HIDDEN, seed=seed + n), random(n, seed=seed + n + 1).abs()) for n in counts]


def outputs(experts: Any, expert: Expert, inputs: Tensor) -> Tensor:
    found = inner_activations(experts, expert, inputs) @ expert.parts["down_proj"]
    return found if expert.offset is None else found + expert.offset


def error(experts: Any, expert: Expert, members: list[Expert], tokens: list[Sample]) -> float:
    return sum(
        float((one.gate_N[:, None] * (outputs(experts, expert, one.input_NH) - outputs(experts, m, one.input_NH)))
              .square().sum())
        for m, one in zip(members, tokens, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("limit", [1, 5, 64, 1000])
def test_an_even_sample_is_every_nth_row(limit: int) -> None:
    rows = torch.arange(300)
    sample, start = EvenSample(limit), 0
    for size in (1, 50, 3, 146, 100):
        sample.add(rows[start : start + size], -rows[start : start + size])
        start += size
    step = next(2**power for power in range(12) if -(-300 // 2**power) <= limit)
    first, second = sample.kept
    assert torch.equal(first, rows[::step]) and torch.equal(second, -rows[::step])


def test_samples_are_kept_by_expert(tmp_path: Path) -> None:
    moe: Any = SimpleNamespace(num_experts=3, layer=7)
    measured = ExpertSamples(moe, tmp_path / "samples", limit=4)
    for batch in range(3):
        inputs = torch.full((2, 5), float(batch))
        measured.add(1, inputs, inputs, torch.full((2,), batch / 10), torch.ones(2))
        measured.add(2, inputs[:1], inputs[:1], torch.ones(1), torch.ones(1))
    assert measured.measure() == {}
    empty, many, few = load_samples(tmp_path / "samples", 7, 3, 5)
    assert empty.input_NH.shape == (0, 5) and empty.gate_N.shape == (0,)
    assert many.input_NH[:, 0].tolist() == [0, 1, 2] and many.gate_N.tolist() == pytest.approx([0, 0.1, 0.2])
    assert few.input_NH[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_costs_by_output(layout: str) -> None:
    own, other = make_experts(layout), make_experts(layout)
    other.down_proj.data = random(*other.down_proj.shape, seed=5)
    own_tokens, other_tokens = samples(1), samples(100, (3, 0, 0, 11))
    found = by_output(own, other, own_tokens, other_tokens)
    for i in range(EXPERTS):
        for j in range(EXPERTS):
            expected = 0.0
            for tokens in (own_tokens[i], other_tokens[j]):
                change = whole_expert(own, i, tokens.input_NH) - whole_expert(other, j, tokens.input_NH)
                expected += float((tokens.gate_N[:, None] * change).square().sum())
            assert found[i, j] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_costs_by_weights(layout: str) -> None:
    """The distance of the tensors themselves, which the order of neurons does not change."""
    own, other = make_experts(layout), make_experts(layout)
    other.down_proj.data = random(*other.down_proj.shape, seed=5)

    def tensor(experts: Any, expert: int) -> np.ndarray:
        parts = read_expert(experts, expert).parts
        names = [name for name in ("gate_proj", "up_proj", "down_proj") if name in parts]
        rows = [parts[name].double().numpy() for name in names]
        return np.einsum("fa,fb,fc->abc", *rows) if len(rows) == 3 else np.einsum("fa,fb->ab", *rows)

    found = by_weights(own, other, EXPERTS)
    for i in range(EXPERTS):
        for j in range(EXPERTS):
            distance = ((tensor(own, i) - tensor(other, j)) ** 2).sum()
            assert found[i, j] == pytest.approx(distance, rel=1e-6)
    other.load_state_dict(own.state_dict())
    order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(0))
    permuted = read_expert(own, 1).permuted(order)
    assert float((permuted.rows_FD - read_expert(own, 1).rows_FD).abs().max()) > 0.1
    write_expert(other, 1, permuted)
    assert by_weights(own, other, EXPERTS)[1, 1] == pytest.approx(0, abs=1e-6 * float(found.max()))


def judged(experts: Any, expert: Expert, members: list[Expert], tokens: list[Sample]) -> float:
    """Squared error of gated outputs, by the weights of the fit."""
    total = 0.0
    for member, sample in zip(members, tokens, strict=True):
        true = sample.gate_N[:, None] * outputs(experts, member, sample.input_NH)
        squares = true.square().sum(1)
        change = sample.gate_N[:, None] * outputs(experts, expert, sample.input_NH) - true
        total += float((change.square().sum(1) * (1 / squares.mean() + 1 / (squares + squares.median()))).sum())
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_fit_is_better_than_the_one_before_on_new_tokens(layout: str) -> None:
    experts = make_experts(layout)
    members = [read_expert(experts, number) for number in (0, 1)]
    tokens, fresh = ([samples(seed, (900,))[0], samples(seed + 50, (800,))[0]] for seed in (1, 5000))
    errors = []
    for fit in ("average", "closed_form", "gradient"):
        fitted = fit_expert(experts, members, (0.5, 0.5), tokens, fit, 150)
        errors.append(judged(experts, fitted, members, fresh))
    assert errors[2] < 0.99 * errors[1] and errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize("fit", ["closed_form", "gradient"])
def test_few_tokens_do_no_harm(fit: str) -> None:
    """On the tokens that are held out, one of eight, no fit is worse than the average."""
    experts = make_experts("plain")
    for seed in range(5):
        members, tokens = (
            [read_expert(experts, n) for n in (0, 1)],
            [samples(seed, (16,))[0], samples(seed + 9, (24,))[0]],
        )
        held = [Sample(one.input_NH[7::8], one.gate_N[7::8]) for one in tokens]
        average = fit_expert(experts, members, (0.5, 0.5), tokens, "average", 1)
        fitted = fit_expert(experts, members, (0.5, 0.5), tokens, fit, 30)
        weights = [
            (1 / s.mean() + 1 / (s + s.median())).sqrt()
            for m, o in zip(members, tokens, strict=True)
            for s in [(o.gate_N[:, None] * outputs(experts, m, o.input_NH)).square().sum(1)]
        ]
        held = [Sample(o.input_NH, o.gate_N * w[7::8]) for o, w in zip(held, weights, strict=True)]
        assert error(experts, fitted, members, held) <= error(experts, average, members, held) * (1 + 1e-5)


@pytest.mark.parametrize("layout", ["plain", "biases"])
def test_the_closed_form_is_penalised_least_squares(layout: str) -> None:
    """Of the penalties on the distance from the average, that with the least error on the held-out tokens."""
    experts = make_experts(layout)
    start, rng = read_expert(experts, 0), torch.Generator().manual_seed(3)
    learned, held = (Tokens(*(torch.randn(n, width, generator=rng) for width in (HIDDEN, 1, HIDDEN))) for n in (60, 20))
    found = closed_form(experts, start, learned, held)
    offset = 0.0 if start.offset is None else start.offset
    rows = (learned.gate_N1 * inner_activations(experts, start, learned.input_NH)).double().numpy()
    goals = (learned.target_NH - learned.gate_N1 * offset).double().numpy()
    before = start.parts["down_proj"].double().numpy()
    candidates = []
    for penalty in PENALTIES:
        root = np.sqrt(penalty * (rows**2).sum() / NEURONS)
        left = np.concatenate([rows, root * np.eye(NEURONS)])
        down, *_ = np.linalg.lstsq(left, np.concatenate([goals, root * before]), rcond=None)
        candidates.append(Expert(start.parts | {"down_proj": torch.from_numpy(down).float()}, start.offset))
    best = min(candidates, key=lambda one: float(held.error(experts, one)))
    assert float(held.error(experts, best)) < float(held.error(experts, start)), "the test means something"
    torch.testing.assert_close(found.parts["down_proj"], best.parts["down_proj"], rtol=1e-3, atol=1e-3)


def test_token_weights() -> None:
    squares = torch.tensor([4.0, 1.0, 9.0, 1e4])
    rows = torch.zeros(4, 3)
    rows[:, 1] = squares.sqrt()
    expected = 1 / squares.mean() + 1 / (squares + 4.0)  # the median, the lower one of two
    torch.testing.assert_close(token_weights(rows), expected.sqrt())
    assert token_weights(torch.zeros(5, 3)).tolist() == [1.0] * 5 and token_weights(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("fit", ["average", "closed_form", "gradient"])
def test_equal_members_are_what_they_are(fit: str) -> None:
    experts = make_experts("plain")
    member = read_expert(experts, 2)
    fitted = fit_expert(experts, [member, member], (0.5, 0.5), [samples(1, (60,))[0], samples(2, (60,))[0]], fit, 5)
    for name, part in member.parts.items():
        torch.testing.assert_close(fitted.parts[name], part, rtol=0, atol=2e-3)


@pytest.mark.parametrize("fit", ["closed_form", "gradient"])
def test_without_tokens_it_is_the_average(fit: str) -> None:
    experts = make_experts("plain")
    members = [read_expert(experts, number) for number in (0, 1)]
    fitted = fit_expert(experts, members, (0.25, 0.75), samples(1, (0, 0)), fit, 5)
    for name, part in fitted.parts.items():
        torch.testing.assert_close(part, 0.25 * members[0].parts[name] + 0.75 * members[1].parts[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_ranks(layout: str) -> None:
    """Rank 0 is the stored expert itself; more is never worse, and full rank loses nothing."""
    experts = make_experts(layout)
    lead, member, sample = read_expert(experts, 0), read_expert(experts, 1), samples(1, (80,))[0]
    ranks = [0, 1, 3, 5, min(NEURONS, HIDDEN)]
    found = rank_errors(experts, lead, member, sample, ranks)
    assert found[0] == pytest.approx(error(experts, lead, [member], [sample]), rel=1e-4)
    assert all(less < more for more, less in pairwise(found))
    assert found[-1] < 1e-6 * found[0]


def test_the_best_successor_is_least_squares() -> None:
    """Against the pseudo-inverse; without anything seen it is the matrix itself."""
    matrix, h, other = (random(*size, seed=n).double() for n, size in enumerate(((5, 7), (40, 7), (40, 7))))
    found = best_successor(matrix, h.T @ other, other.T @ other)
    expected = (torch.linalg.pinv(other) @ (h @ matrix.T)).T
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    nothing = torch.zeros(7, 7, dtype=torch.float64)
    torch.testing.assert_close(best_successor(matrix, nothing, nothing), matrix)
    torch.testing.assert_close(best_successor(matrix, h.T @ h, h.T @ h), matrix)


def test_the_best_scale() -> None:
    matrix, lead, x = (random(*size, seed=n).double() for n, size in enumerate(((5, 7), (5, 7), (400, 7))))
    moment = x.T @ x
    found = float(best_scale(matrix, lead, moment))
    rests = [matrix - scale * lead for scale in (found - 0.05, found, found + 0.05)]
    errors = [float((rest @ x.T).square().sum()) for rest in rests]
    assert errors[1] < min(errors[0], errors[2])
    assert float(best_scale(matrix, torch.zeros(5, 7), moment)) == 0
