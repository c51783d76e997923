"""A damped positive semi-definite matrix, decomposed: square, diagonal, or thin.

A *thin* matrix is stored as X, (r, n) with r < n, and stands for ``X^T X``, see
:func:`funcprecond.linalg.gram.is_thin`. Its damped inverse is ``(I - W^T W) / ridge``, where W has
the shape of X, so that no (n, n) matrix is formed.
"""

import torch
from torch import Tensor

from funcprecond.linalg.differentiable import cholesky_inverse
from funcprecond.linalg.gram import is_thin

__all__ = ["damped_factor", "mean_eigenvalue", "rounding", "solve_damped"]


def damped_factor(matrices: Tensor, ridge: Tensor, invert: bool) -> Tensor:
    """Decompose or invert ``matrix + ridge I``.

    Args:
        matrices: a stack (..., n, n) of square matrices, (..., r, n) of thin ones, or (..., n) of
            diagonals.
        ridge: the ridge of each matrix, with the leading axes of the stack.
        invert: whether to invert square matrices; otherwise their lower Cholesky factors are
            returned.

    Returns:
        The factors, shaped like ``matrices``: W of thin matrices, and the inverse of diagonals.
    """
    if matrices.ndim == ridge.ndim + 1:
        return 1 / (matrices + ridge.unsqueeze(-1))
    rows = matrices
    if is_thin(rows):
        matrices = rows @ rows.mT
    damped = matrices.diagonal(dim1=-2, dim2=-1) + ridge.unsqueeze(-1)
    lower, _ = torch.linalg.cholesky_ex(torch.diagonal_scatter(matrices, damped, dim1=-2, dim2=-1))
    if is_thin(rows):
        return torch.linalg.solve_triangular(lower, rows, upper=False)
    return cholesky_inverse(lower) if invert else lower


def solve_damped(factor: Tensor, ridge: Tensor, x: Tensor, invert: bool) -> Tensor:
    """``x (matrix + ridge I)^-1`` for the rows x, (..., m, n).

    Args:
        factor: the result of :func:`damped_factor`.
        ridge, invert: its arguments.
        x: the rows.
    """
    if factor.ndim == 1:
        return x * factor
    if is_thin(factor):
        return (x - (x @ factor.mT) @ factor) / ridge[..., None, None]
    return x @ factor if invert else torch.cholesky_solve(x.mT, factor).mT


def mean_eigenvalue(matrix: Tensor) -> Tensor:
    """The mean of the eigenvalues of each matrix; of a tensor with one axis, a diagonal matrix."""
    if is_thin(matrix):
        return matrix.square().sum((-2, -1)) / matrix.shape[-1]
    return (matrix if matrix.ndim == 1 else matrix.diagonal(dim1=-2, dim2=-1)).mean(-1)


def rounding(matrix: Tensor) -> Tensor:
    """The least ridge that keeps a matrix positive definite under rounding; 0 for a diagonal."""
    if matrix.ndim == 1:
        return torch.zeros_like(matrix[0])
    return matrix.shape[-1] * torch.finfo(matrix.dtype).eps * mean_eigenvalue(matrix)
