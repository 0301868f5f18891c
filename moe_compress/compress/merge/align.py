"""Which neuron of one expert is which neuron of another: exact linear assignment.

Averaging experts neuron by neuron only makes sense between neurons that do the same. The assignment is exact (the
algorithm of scipy is a modified Jonker-Volgenant, cubic in the number of neurons).
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def by_weights(reference_FD: Tensor, other_FD: Tensor) -> Tensor:
    """Order int64 [F] of `other`'s rows with the least sum of squared distances to `reference`'s, row by row."""
    # |a - b|^2 summed is constant less twice the inner products
    return _assign(reference_FD.double() @ other_FD.double().T)


def by_activations(reference_NF: Tensor, other_NF: Tensor) -> Tensor:
    """Order int64 [F] of `other`'s neurons with the greatest sum of correlations with `reference`'s on the same inputs.

    A neuron that never varies correlates with nothing.
    """
    return _assign(_standardised(reference_NF).T @ _standardised(other_NF))


def _standardised(values_NF: Tensor) -> Tensor:
    centred = values_NF.double() - values_NF.double().mean(0)
    norms = centred.norm(dim=0)
    standardised: Tensor = centred / norms.masked_fill(norms == 0, torch.inf)
    return standardised


def _assign(gain_FF: Tensor) -> Tensor:
    rows, columns = linear_sum_assignment(gain_FF.cpu().numpy(), maximize=True)
    assert (rows[1:] > rows[:-1]).all(), "scipy returns rows in order"
    return torch.from_numpy(columns)
