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


def best_scale(matrix_OI: Tensor, lead_OI: Tensor, moment_II: Tensor) -> Tensor:
    """The number s with the least sum of |(M - s L) x|^2; 0 for a matrix L that gives nothing."""
    weighted = lead_OI.double() @ damped(moment_II)
    energy = (weighted * lead_OI.double()).sum()
    return torch.where(energy > 0, (weighted * matrix_OI.double()).sum() / energy, torch.zeros_like(energy))


def best_successor(matrix_OI: Tensor, cross_II: Tensor, moment_II: Tensor) -> Tensor:
    """The matrix M with the least sum of |W h - M h'|^2, float64 [O, I]; W itself where nothing was seen.

    `cross_II` is the sum of h h'^T, `moment_II` that of h' h'^T.
    """
    moment = damped(moment_II)
    added = (moment - moment_II.double()).diagonal().mean()
    cross = cross_II.double() + added * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    solved: Tensor = torch.linalg.solve(moment, (matrix_OI.double() @ cross).T)
    return solved.T
