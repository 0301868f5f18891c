"""The divergence and its gradient against the formula in float64, for whole and for kept logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_compress.compress.distill import losses
from moe_compress.compress.distill.losses import TopLogits, divergence, hidden_loss, next_token_loss, policy_loss

TOKENS, VOCABULARY = 7, 23


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Student's and teacher's, float64 [T, V]."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64) for _ in "st")
    return student.requires_grad_(), teacher


def formula(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """t^2 * sum p log(p / s), and its gradient by autograd."""
    p = (teacher / temperature).exp() / (teacher / temperature).exp().sum(-1, keepdim=True)
    s = (student / temperature).exp() / (student / temperature).exp().sum(-1, keepdim=True)
    loss = temperature**2 * (p * (p / s).log()).sum()
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def bucket_formula(student: Tensor, teacher: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The divergence of `count` outcomes and of one for all others."""
    p, s = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    top = p.topk(count).indices
    is_top = torch.zeros_like(p).scatter(1, top, 1.0).bool()
    loss = torch.zeros((), dtype=torch.float64)
    for token in range(len(p)):
        kept, own = p[token][is_top[token]], s[token][is_top[token]]
        other, other_own = p[token][~is_top[token]].sum(), s[token][~is_top[token]].sum()
        loss = loss + (kept * (kept / own).log()).sum() + other * (other / other_own).log()
    loss = temperature**2 * loss
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def found(student: Tensor, teacher: Tensor | TopLogits, temperature: float) -> tuple[Tensor, Tensor]:
    loss = divergence(student, teacher, temperature)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def exact_top(teacher: Tensor, count: int, temperature: float) -> TopLogits:
    """`TopLogits.of` in float64."""
    log = (teacher / temperature).log_softmax(-1)
    kept, index = log.topk(count)
    return TopLogits(index, kept, log.scatter(1, index, -torch.inf).logsumexp(-1))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 10**6])
def test_divergence_is_the_formula(
    logits: tuple[Tensor, Tensor], temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    for one, other in zip(found(*logits, temperature), formula(*logits, temperature), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("count", [1, 5, VOCABULARY - 1])
def test_of_kept_logits_it_is_that_of_k_plus_one_outcomes(
    logits: tuple[Tensor, Tensor], count: int, temperature: float
) -> None:
    student, teacher = logits
    top = exact_top(teacher, count, temperature)
    expected = bucket_formula(student, teacher, count, temperature)
    for one, other in zip(found(student, top, temperature), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert expected[0] <= formula(student, teacher, temperature)[0]


def test_all_logits_kept_are_the_whole_divergence(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    top = TopLogits.of(teacher, VOCABULARY, 1.5)
    assert top.index_TK.shape == (TOKENS, VOCABULARY)
    for one, other in zip(found(student, top, 1.5), formula(student, teacher, 1.5), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # kept in float32


def test_kept_logits_are_the_largest_with_their_probabilities(logits: tuple[Tensor, Tensor]) -> None:
    _, teacher = logits
    top = TopLogits.of(teacher, 4, 2.0)
    probabilities = (teacher / 2).softmax(-1)
    for token in range(TOKENS):
        best = sorted(range(VOCABULARY), key=lambda word: -teacher[token, word])[:4]
        assert top.index_TK[token].tolist() == best
        torch.testing.assert_close(top.log_TK[token].exp().double(), probabilities[token, best], rtol=1e-6, atol=0)
        rest = 1 - probabilities[token, best].sum()
        torch.testing.assert_close(top.rest_T[token].exp().double(), rest, rtol=1e-5, atol=0)


def test_words_that_a_model_rules_out_cost_nothing(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    ruled_out = teacher.clone()
    ruled_out[:, :3] = -torch.inf
    expected = formula(student, teacher.masked_fill(ruled_out.isinf(), -400.0), 1.0)
    for target in (ruled_out, exact_top(ruled_out, VOCABULARY - 3, 1.0), exact_top(ruled_out, VOCABULARY - 1, 1.0)):
        for one, other in zip(found(student, target, 1.0), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_equal_models_have_no_divergence_and_no_gradient(logits: tuple[Tensor, Tensor]) -> None:
    student, _ = logits
    loss, gradient = found(student, student.detach().clone(), 1.0)
    assert loss == 0
    assert gradient.abs().max() == 0


def test_next_token_loss_is_the_mean_over_all_but_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    tokens = torch.randint(11, (2, 5), generator=generator)
    expected = [-logits[b, s].softmax(-1)[tokens[b, s + 1]].log() for b in range(2) for s in range(4)]
    torch.testing.assert_close(next_token_loss(logits, tokens).double(), sum(expected) / 8, rtol=1e-6, atol=0)


def test_hidden_loss_is_relative_to_the_teachers_size() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = tuple(10.0**layer * torch.randn(2, 3, 4, generator=generator) for layer in range(3))
    assert hidden_loss(wanted, wanted) == 0
    assert float(hidden_loss(tuple(1.5 * h for h in wanted), wanted)) == pytest.approx(0.25)
    one = (wanted[0] + torch.tensor([1.0, 0, 0, 0]), *wanted[1:])
    expected = (1 / wanted[0].double().square().sum(-1)).mean() / 3
    assert float(hidden_loss(one, wanted)) == pytest.approx(float(expected), rel=1e-5)


def test_the_policy_gradient_is_that_of_the_reverse_divergence(logits: tuple[Tensor, Tensor]) -> None:
    """Its mean over all tokens that could be drawn, each as likely as the student finds it."""
    student, teacher = logits
    log_s, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    kl = (log_s.exp() * (log_s - log_p)).sum(-1)
    for token in range(TOKENS):
        own, old, wanted = log_s[token], log_s[token].detach(), log_p[token]
        mean = torch.stack([old[v].exp() * policy_loss(own[v], old[v], wanted[v]) for v in range(VOCABULARY)]).sum()
        assert mean.item() == pytest.approx(kl[token].item())
        found, expected = (torch.autograd.grad(value, student, retain_graph=True)[0] for value in (mean, kl[token]))
        torch.testing.assert_close(found, expected)
