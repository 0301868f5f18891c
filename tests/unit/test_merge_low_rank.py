"""Low-rank factors against the singular value decomposition of the matrix times the root of the second moment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_compress.compress.merge.low_rank import best_factors, damped

SHAPES = [(5, 9), (9, 5), (6, 6)]


def problem(shape: tuple[int, int], tokens: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -2, shape[1], dtype=torch.float64)
    inputs = torch.randn(tokens, shape[1], generator=generator, dtype=torch.float64) * scales
    return matrix, inputs.T @ inputs


def weighted_error(matrix: Tensor, moment: Tensor) -> float:
    """Sum of |M x|^2 over inputs with this second moment."""
    return float(torch.trace(matrix @ moment @ matrix.T))


@pytest.mark.parametrize("shape", SHAPES)
def test_no_matrix_of_that_rank_is_nearer(shape: tuple[int, int]) -> None:
    matrix, moment = problem(shape)
    weighted = matrix @ torch.linalg.cholesky(damped(moment))
    singular = torch.linalg.svdvals(weighted)
    for rank in range(1, min(shape) + 1):
        left, right = best_factors(matrix, moment, rank)
        assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
        torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64))
        error = weighted_error(matrix - left @ right, damped(moment))
        assert error == pytest.approx(float(singular[rank:].square().sum()), rel=1e-9, abs=1e-9 * float(singular[0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_nothing_is_lost(shape: tuple[int, int]) -> None:
    matrix, moment = problem(shape)
    left, right = best_factors(matrix, moment, 100)
    torch.testing.assert_close(left @ right, matrix)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_inputs(shape: tuple[int, int], tokens: int) -> None:
    """What the inputs see is exact as soon as the rank holds it; without any it is the plain decomposition."""
    matrix, moment = problem(shape, tokens)
    left, right = best_factors(matrix, moment, 3)
    if tokens:
        assert weighted_error(matrix - left @ right, moment) < 1e-3 * weighted_error(matrix, moment)
    else:
        u, s, vt = torch.linalg.svd(matrix)
        torch.testing.assert_close(left @ right, u[:, :3] @ torch.diag(s[:3]) @ vt[:3])
