"""The losses of whole-model distillation.

The divergence's gradient by the student's logits z is known in closed form, so it is computed with the loss, a few
tokens at a time, and no probabilities of a whole batch are kept. With temperature t, teacher p and student s, both
softmax(z / t):

    loss = t^2 * sum p log(p / s)          gradient = t * (s - p)

(Hinton et al., arXiv 1503.02531, eq. 2 to 4.) Of a cached teacher only the k largest probabilities are known, and the
sum r_p of all others. Those others are one outcome then, for the student too (r_s): the divergence of these k + 1
outcomes. It is never more than the whole one, equal to it where k is the vocabulary, and its gradient is t * (s - q)
with q = p for the k and q = s * r_p / r_s for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # logits whose probabilities are in memory at once


@dataclass(frozen=True)
class TopLogits:
    """What is kept of a teacher's probabilities at one temperature, for T tokens.

    `index_TK` the K most probable tokens, `log_TK` their log-probabilities, `rest_T` the log of what all others have.
    """

    index_TK: Tensor
    log_TK: Tensor
    rest_T: Tensor

    @classmethod
    def of(cls, logits_TV: Tensor, count: int, temperature: float) -> TopLogits:
        """The `count` largest (all, where there are fewer)."""
        log_TV = (logits_TV.float() / temperature).log_softmax(-1)
        log_TK, index_TK = log_TV.topk(min(count, log_TV.shape[1]), dim=-1)
        return cls(index_TK, log_TK, log_TV.scatter(1, index_TK, -torch.inf).logsumexp(-1))

    def rows(self, start: int, end: int) -> TopLogits:
        """Those of some of the tokens."""
        return TopLogits(self.index_TK[start:end], self.log_TK[start:end], self.rest_T[start:end])


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, teacher: Tensor | TopLogits, temperature: float) -> Tensor:
        compute = torch.promote_types(logits_TV.dtype, torch.float32)
        gradient_TV = torch.empty_like(logits_TV)
        total = logits_TV.new_zeros((), dtype=torch.float64)
        step = max(1, CHUNK_ELEMENTS // logits_TV.shape[1])
        for start in range(0, len(logits_TV), step):
            end = min(start + step, len(logits_TV))
            log_s = (logits_TV[start:end].to(compute) / temperature).log_softmax(-1)
            if isinstance(teacher, TopLogits):
                loss, target = _from_top(log_s, teacher.rows(start, end))
            else:
                loss, target = _from_all(log_s, (teacher[start:end].to(compute) / temperature).log_softmax(-1))
            total += temperature**2 * loss.sum(dtype=torch.float64)
            gradient_TV[start:end] = temperature * (log_s.exp() - target)
        ctx.save_for_backward(gradient_TV)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        (gradient_TV,) = ctx.saved_tensors
        return gradient_TV * outer[0].to(gradient_TV.dtype), None, None


def divergence(logits_TV: Tensor, teacher: Tensor | TopLogits, temperature: float) -> Tensor:
    """Sum over T tokens of KL(teacher || student) at a temperature, times its square; a float64 scalar.

    `logits_TV` are the student's; `teacher` all its logits [T, V] or the largest ones. The gradient is exact.
    """
    found: Tensor = _Divergence.apply(logits_TV, teacher, temperature)
    return found


def next_token_loss(logits_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next tokens."""
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), tokens_BS[:, 1:].flatten())


def policy_loss(log_BR: Tensor, old_BR: Tensor, teacher_BR: Tensor) -> Tensor:
    """Policy gradient of the sampled reverse KL divergence: what the student drew, by how much likelier it was to it.

    Log-probabilities of the drawn tokens: by the student as it is, when they were drawn, and by the teacher. With the
    advantage A = teacher - old this is -mean(exp(log - old) A), whose gradient is -mean(A grad log) as long as the
    student is the one that drew; its value is then the mean of old - teacher (arXiv 2605.18643).
    """
    return -((log_BR - old_BR).exp() * (teacher_BR - old_BR)).mean()


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean over layers and tokens of |h_s - h_t|^2 / |h_t|^2; each pair is what left a layer, [..., H]."""
    errors = [
        ((own.float() - wanted.float()).square().sum(-1) / wanted.float().square().sum(-1).clamp(min=1e-12)).mean()
        for own, wanted in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


def _from_all(log_s: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Terms [n, V] of the divergence, and the teacher's probabilities."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_s), 0), p


def _from_top(log_s: Tensor, top: TopLogits) -> tuple[Tensor, Tensor]:
    """Terms of the divergence over the K outcomes and the rest, and the q [n, V] of the gradient."""
    index, log_p, log_rest = top.index_TK, top.log_TK.to(log_s.dtype), top.rest_T.to(log_s.dtype)
    p, rest = log_p.exp(), log_rest.exp()
    terms = torch.where(p > 0, p * (log_p - log_s.gather(1, index)), 0)
    if index.shape[1] == log_s.shape[1]:
        return terms, torch.zeros_like(log_s).scatter(1, index, p)
    log_rest_s = log_s.scatter(1, index, -torch.inf).logsumexp(-1)
    of_rest = torch.where(rest > 0, rest * (log_rest - log_rest_s), 0)
    target = (log_s + (log_rest - log_rest_s)[:, None]).exp().scatter(1, index, p)
    return torch.cat([terms, of_rest[:, None]], dim=1), target
