"""What it would cost that an expert of one layer takes the place of an expert of another.

`by_output`: over sampled tokens x of both, the sum of g^2 |f(x) - f'(x)|^2, each gate value g that of the layer the
token was sampled in. `by_weights`: the squared distance of the experts' tensors, the sum over neurons of the outer
product of a neuron's gate row, up row and down column, which no order of neurons changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_compress.compress.merge.neurons import Expert, read_expert
from moe_compress.compress.tie.samples import Sample
from moe_compress.models.experts import whole_expert

Array = NDArray[np.float64]


@torch.no_grad()
def by_output(own: Any, other: Any, own_samples: Sequence[Sample], other_samples: Sequence[Sample]) -> Array:
    """Cost float64 [E, E] of each expert of the module `own` in the place of each of `other`.

    Experts that no token reached cost what the other side's tokens say; two such experts cost nothing.
    """
    costs: Array = _one_sided(own, other, own_samples) + _one_sided(other, own, other_samples).T
    return costs


def _one_sided(own: Any, other: Any, samples: Sequence[Sample]) -> Array:
    """[E, E]: over each own expert's tokens, the error when the other module's experts run instead."""
    input_NH = torch.cat([sample.input_NH for sample in samples])
    gate_N = torch.cat([sample.gate_N for sample in samples])
    sizes, num_experts = [len(sample.gate_N) for sample in samples], len(samples)
    pieces = zip(range(num_experts), input_NH.split(sizes), strict=True)
    true_NH = torch.cat([whole_expert(own, expert, piece) for expert, piece in pieces])
    costs = np.zeros((num_experts, num_experts))
    for expert in range(num_experts):
        error_NH = gate_N[:, None] * (whole_expert(other, expert, input_NH) - true_NH)
        squares = error_NH.square().sum(1, dtype=torch.float64).split(sizes)
        costs[:, expert] = [float(piece.sum()) for piece in squares]
    return costs


@torch.no_grad()
def by_weights(own: Any, other: Any, num_experts: int) -> Array:
    """Cost float64 [E, E] of each expert of the module `own` in the place of each of `other`."""
    lefts = [read_expert(own, expert) for expert in range(num_experts)]
    rights = [read_expert(other, expert) for expert in range(num_experts)]
    left_E = np.array([_inner(one, one) for one in lefts])
    right_E = np.array([_inner(one, one) for one in rights])
    products = np.array([[_inner(left, right) for right in rights] for left in lefts])
    costs: Array = left_E[:, None] + right_E[None, :] - 2 * products
    return costs


def _inner(one: Expert, other: Expert) -> float:
    """Inner product of two experts' tensors."""
    product: Tensor | float = 1.0
    for name in ("gate_proj", "up_proj", "down_proj"):
        if name in one.parts:
            product = product * (one.parts[name].double() @ other.parts[name].double().T)
    return float(torch.as_tensor(product).sum())
