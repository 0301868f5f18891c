"""Fitting one expert to stand for several: an average, then least squares on their own tokens.

The error is the sum over layers and sampled tokens of (w g)^2 |f_bank(x) - f(x)|^2, f the layer's own expert, g the
token's gate value and w its weight (`weighting`). The down projection that minimises it for given gate and up
projections is known in closed form, with a penalty on its distance from the average; gradient descent (Adam, the
learning rate falling to 0 along a half cosine) then changes all projections. An expert has far more weights than it has
sampled tokens, so every eighth token is held out: penalty and step are those of the least error on these, and an
average that is better than any of them stays. Deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compress.compress.merge.average import average
from moe_compress.compress.merge.neurons import DOWN, Expert, inner_activations
from moe_compress.compress.tie.samples import Sample
from moe_compress.compress.tie.weighting import token_weights

HELD_OUT = 8  # one of so many tokens
PENALTIES = (0.01, 0.1, 1.0, 10.0)  # of the mean squared activation, on the distance from the average
LEARNING_RATE = 0.02  # relative to the root mean square of a projection's weights
BETAS = (0.9, 0.98)
CHECKED_STEPS = 5  # between looks at the held-out tokens


@dataclass(frozen=True)
class Tokens:
    """Inputs [N, H], what multiplies an expert's output [N, 1], and the outputs [N, H], multiplied, that are wanted."""

    input_NH: Tensor
    gate_N1: Tensor
    target_NH: Tensor

    def error(self, experts: Any, expert: Expert) -> Tensor:
        """Squared error over the squares that are wanted."""
        found_NH = self.gate_N1 * _output(experts, expert, self.input_NH)
        wanted = self.target_NH.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        return (found_NH - self.target_NH).square().sum() / wanted

    def rows(self, which: slice | Tensor) -> Tokens:
        """Some of them."""
        return Tokens(self.input_NH[which], self.gate_N1[which], self.target_NH[which])


def fit_expert(
    experts: Any, members: Sequence[Expert], weights: Sequence[float], samples: Sequence[Sample], fit: str, steps: int
) -> Expert:
    """The expert of a bank for `members`, aligned and one of each layer, with their tokens.

    `experts` is a fused experts module that knows the activation; `fit` and `steps` are settings of `op: tie`.
    """
    start = average(members, weights)
    if fit == "average" or not any(len(sample.gate_N) for sample in samples):
        return start
    learned, held = _split(experts, members, samples)
    closed = closed_form(experts, start, learned, held)
    return closed if fit == "closed_form" else descend(experts, closed, learned, held, steps)


def closed_form(experts: Any, start: Expert, learned: Tokens, held: Tokens) -> Expert:
    """`start` with the best down projection for what it has before it, or as it is."""
    inner_NF = (learned.gate_N1 * inner_activations(experts, start, learned.input_NH)).double()
    target_NH = learned.target_NH.double()
    if start.offset is not None:
        target_NH = target_NH - learned.gate_N1 * start.offset
    moment, before = inner_NF.T @ inner_NF, start.parts[DOWN].double()
    mean = moment.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    best, least = start, float(held.error(experts, start))
    for penalty in PENALTIES:
        hold = penalty * mean * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
        down = torch.linalg.solve(moment + hold, inner_NF.T @ target_NH + hold @ before)
        expert = Expert(start.parts | {DOWN: down.float()}, start.offset)
        error = float(held.error(experts, expert))
        if error < least:
            best, least = expert, error
    return best


@torch.enable_grad()
def descend(experts: Any, start: Expert, learned: Tokens, held: Tokens, steps: int) -> Expert:
    """What gradient descent finds from `start` in this many steps, at its best on the held-out tokens."""
    parts = {name: part.clone().requires_grad_() for name, part in start.parts.items()}
    offset = None if start.offset is None else start.offset.clone().requires_grad_()
    tensors = [*parts.values(), *([offset] if offset is not None else [])]
    rates = [LEARNING_RATE * float(tensor.detach().square().mean().sqrt()) for tensor in tensors]
    groups = [{"params": [tensor], "lr": rate} for tensor, rate in zip(tensors, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    best, least = start, math.inf
    for step in range(steps + 1):
        expert = Expert(parts, offset)
        if step % CHECKED_STEPS == 0 or step == steps:
            with torch.no_grad():
                error = float(held.error(experts, expert))
            if error < least:
                least = error
                found = {name: part.detach().clone() for name, part in parts.items()}
                best = Expert(found, None if offset is None else offset.detach().clone())
        if step < steps:
            optimizer.zero_grad()
            learned.error(experts, expert).backward()
            optimizer.step()
            schedule.step()
    return best


def _split(experts: Any, members: Sequence[Expert], samples: Sequence[Sample]) -> tuple[Tokens, Tokens]:
    """The tokens of all members: those that are learned from, and those that are held out."""
    learned, held = [], []
    for member, sample in zip(members, samples, strict=True):
        if not len(sample.gate_N):
            continue
        true_NH = sample.gate_N[:, None] * _output(experts, member, sample.input_NH)
        weight_N1 = token_weights(true_NH)[:, None]
        tokens = Tokens(sample.input_NH, weight_N1 * sample.gate_N[:, None], weight_N1 * true_NH)
        out = torch.arange(len(weight_N1)) % HELD_OUT == HELD_OUT - 1
        learned.append(tokens.rows(~out))
        held.append(tokens.rows(out))
    return _joined(learned), _joined(held)


def _joined(found: Sequence[Tokens]) -> Tokens:
    columns = zip(*((one.input_NH, one.gate_N1, one.target_NH) for one in found), strict=True)
    return Tokens(*(torch.cat(column) for column in columns))


def _output(experts: Any, expert: Expert, input_NH: Tensor) -> Tensor:
    output_NH = inner_activations(experts, expert, input_NH) @ expert.parts[DOWN]
    return output_NH if expert.offset is None else output_NH + expert.offset
