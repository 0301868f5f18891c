"""Fitting one expert to stand for several: an average, then least squares on their own tokens.

The error is the sum over layers and sampled tokens of g^2 |f_bank(x) - f(x)|^2, f the layer's own expert. The down
projection that minimises it for given gate and up projections is known in closed form; gradient descent (Adam, the
learning rate falling to 0 along a half cosine) then changes all projections. Deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_compress.compress.merge.average import average
from moe_compress.compress.merge.low_rank import DAMPING
from moe_compress.compress.merge.neurons import DOWN, Expert, inner_activations
from moe_compress.compress.tie.samples import Sample

LEARNING_RATE = 0.05  # relative to the root mean square of a projection's weights
BETAS = (0.9, 0.98)


def fit_expert(
    experts: Any, members: Sequence[Expert], weights: Sequence[float], samples: Sequence[Sample], fit: str, steps: int
) -> Expert:
    """The expert of a bank for `members`, aligned and one of each layer, with their tokens.

    `experts` is a fused experts module that knows the activation; `fit` and `steps` are settings of `op: tie`.
    """
    start = average(members, weights)
    data = [
        (sample.input_NH, sample.gate_N[:, None], sample.gate_N[:, None] * _output(experts, member, sample.input_NH))
        for member, sample in zip(members, samples, strict=True)
        if len(sample.gate_N)
    ]
    if fit == "average" or not data:
        return start
    input_NH, gate_N1, target_NH = (torch.cat(column) for column in zip(*data, strict=True))
    closed = closed_form(experts, start, input_NH, gate_N1, target_NH)
    return closed if fit == "closed_form" else descend(experts, closed, input_NH, gate_N1, target_NH, steps)


def closed_form(experts: Any, expert: Expert, input_NH: Tensor, gate_N1: Tensor, target_NH: Tensor) -> Expert:
    """The expert with the best down projection for what it has before it; a little is held by what it was."""
    inner_NF = (gate_N1 * inner_activations(experts, expert, input_NH)).double()
    target_NH = target_NH.double() if expert.offset is None else target_NH.double() - gate_N1 * expert.offset
    moment = inner_NF.T @ inner_NF
    hold = DAMPING * moment.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    right = inner_NF.T @ target_NH + hold * expert.parts[DOWN].double()
    down = torch.linalg.solve(moment + hold * torch.eye(len(moment), dtype=torch.float64, device=moment.device), right)
    return Expert(expert.parts | {DOWN: down.float()}, expert.offset)


@torch.enable_grad()
def descend(experts: Any, start: Expert, input_NH: Tensor, gate_N1: Tensor, target_NH: Tensor, steps: int) -> Expert:
    """The best expert that gradient descent finds from `start` in this many steps, never a worse one."""
    parts = {name: part.clone().requires_grad_() for name, part in start.parts.items()}
    offset = None if start.offset is None else start.offset.clone().requires_grad_()
    tensors = [*parts.values(), *([offset] if offset is not None else [])]
    rates = [LEARNING_RATE * float(tensor.detach().square().mean().sqrt()) for tensor in tensors]
    groups = [{"params": [tensor], "lr": rate} for tensor, rate in zip(tensors, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    scale = target_NH.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    best, least = start, math.inf
    for step in range(steps + 1):
        expert = Expert(parts, offset)
        loss = (gate_N1 * _output(experts, expert, input_NH) - target_NH).square().sum() / scale
        if loss.item() < least:
            least = loss.item()
            found = {name: part.detach().clone() for name, part in parts.items()}
            best = Expert(found, None if offset is None else offset.detach().clone())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return best


def _output(experts: Any, expert: Expert, input_NH: Tensor) -> Tensor:
    output_NH = inner_activations(experts, expert, input_NH) @ expert.parts[DOWN]
    return output_NH if expert.offset is None else output_NH + expert.offset
