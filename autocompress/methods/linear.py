"""Least squares on second moments: damping, factors and inverses, in the precision that size and safety allow."""

from __future__ import annotations

import torch

DAMPING = 0.01
"""Ridge as a share of the mean input energy: what calibration data say of rare directions is not trusted."""

DOUBLE_UP_TO = 1024
"""Matrices up to this size are worked on in double precision; above, single is safe behind the damping."""


def precision_for(size: int) -> torch.dtype:
    """The type to compute in for a matrix of this size."""
    return torch.float64 if size <= DOUBLE_UP_TO else torch.float32


def damped(hessian: torch.Tensor) -> torch.Tensor:
    """A copy of second moments with the ridge added."""
    matrix = hessian.to(precision_for(hessian.shape[0]), copy=True)
    matrix.diagonal().add_(DAMPING * matrix.diagonal().mean().clamp_min(1e-8))
    return matrix


def factor(matrix: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor; in double precision where single fails."""
    result: torch.Tensor
    result, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        result = torch.linalg.cholesky(matrix.double()).to(matrix.dtype)
    return result


def damped_inverse(hessian: torch.Tensor) -> torch.Tensor:
    """The inverse of damped second moments."""
    return torch.cholesky_inverse(factor(damped(hessian)))


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped inverse."""
    inverse = damped_inverse(hessian)
    return factor(inverse).t().contiguous()


def refit(full: torch.Tensor, hessian: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The weights on the inputs ``places`` that best give what ``full`` gave on all: ``W H[:, S] H[S, S]^-1``."""
    matrix = damped(hessian)
    columns = matrix.index_select(1, places)
    target = full.to(matrix.dtype) @ columns
    return torch.cholesky_solve(target.t(), factor(columns.index_select(0, places))).t()


class NestedRefits:
    """Refits of one layer on ever fewer inputs, from one factorization.

    Inputs are sorted by importance; the factor of the first ``n`` of them is then a corner of the whole factor.

    Args:
        full: the layer's weights, its bias as the last column.
        hessian: second moments of its inputs, the constant input last.
        order: all inputs, the most important first; those that always stay must lead.
    """

    def __init__(self, full: torch.Tensor, hessian: torch.Tensor, order: torch.Tensor) -> None:
        self.order = order
        matrix = damped(hessian)
        self._target = (full.to(matrix.dtype) @ matrix.index_select(1, order)).t().contiguous()
        self._factor = factor(matrix.index_select(0, order).index_select(1, order))

    def first(self, count: int) -> torch.Tensor:
        """The weights on the first ``count`` inputs, in their natural order."""
        corner = self._factor[:count, :count]
        solved = torch.cholesky_solve(self._target[:count], corner)
        return solved.index_select(0, self.order[:count].argsort()).t()
