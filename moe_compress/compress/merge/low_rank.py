"""The best matrix of a given rank in place of another, where it matters: on the inputs that it gets.

For a matrix R [O, I] and inputs with second moment G = sum of x x^T, the product B A of rank r that minimises
the sum of |R x - B A x|^2 has the first r left singular vectors of R G^(1/2) as B, and A = B^T R (Eckart and Young).
No inverse of G is needed, so few inputs do no harm; a little of the plain norm is added for directions they lack.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 1e-4  # of the mean of G's diagonal


def damped(moment_II: Tensor) -> Tensor:
    """A second moment, float64, with a little of every direction; the identity when there were no inputs."""
    moment = moment_II.double()
    mean = moment.diagonal().mean()
    added = DAMPING * mean if mean > 0 else torch.ones_like(mean)
    return moment + added * torch.eye(len(moment), dtype=torch.float64, device=moment.device)


def best_factors(matrix_OI: Tensor, moment_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [O, r] with orthonormal columns and A [r, I], float64; r is at most the smaller side of the matrix."""
    matrix, moment = matrix_OI.double(), damped(moment_II)
    height, width = matrix.shape
    rank = min(rank, height, width)
    if height <= width:
        _, vectors = torch.linalg.eigh(matrix @ moment @ matrix.T)
        left = vectors[:, height - rank :].flip(1)
    else:
        weighted = matrix @ torch.linalg.cholesky(moment)
        _, vectors = torch.linalg.eigh(weighted.T @ weighted)
        left, _ = torch.linalg.qr(weighted @ vectors[:, width - rank :].flip(1))
    return left, left.T @ matrix


def weighted_error(matrix_OI: Tensor, moment_II: Tensor) -> float:
    """Sum of |M x|^2 over inputs with this second moment."""
    matrix = matrix_OI.double()
    return float(((matrix @ moment_II.double()) * matrix).sum())
