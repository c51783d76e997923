"""Roots of inverse matrices that follow a sequence of matrices by products alone.

A root R, (..., n, n), is moved towards ``R R^T = M^-1`` for positive semi-definite matrices M. A
diagonal root is stored as a row, (..., 1, n). A matrix M is square; or diagonal, (n,); or thin, X
of shape (..., r, n) with r < n and ``M = X^T X``.
"""

import torch
from torch import Tensor

from funcprecond.linalg.gram import gram, is_thin

__all__ = ["mean_diagonal", "moved", "projected", "root_like", "squared", "times_square"]


def root_like(matrix: Tensor, diagonal: bool) -> Tensor:
    """The identity for a matrix, as a row if the matrix is diagonal or ``diagonal`` is set."""
    n = matrix.shape[-1]
    if diagonal or matrix.ndim == 1:
        return matrix.new_ones(*matrix.shape[:-2], 1, n)
    eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    return eye.expand(*matrix.shape[:-2], n, n).clone()


def projected(matrix: Tensor, root: Tensor) -> Tensor:
    """``R^T M R``, or the row of its diagonal for a diagonal root."""
    if _is_row(root):
        if matrix.ndim > 1:
            thin = is_thin(matrix)
            matrix = matrix.square().sum(-2) if thin else matrix.diagonal(dim1=-2, dim2=-1)
        return matrix.unsqueeze(-2) * root.square()
    return gram(matrix @ root) if is_thin(matrix) else root.mT @ matrix @ root


def squared(root: Tensor) -> Tensor:
    """``R^T R``, or the row of its diagonal for a diagonal root."""
    return root.square() if _is_row(root) else gram(root)


def mean_diagonal(x: Tensor) -> Tensor:
    """The mean of the diagonal of a matrix or row, (..., 1, 1)."""
    mean = x.mean(-1, keepdim=True) if _is_row(x) else None
    return x.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] if mean is None else mean


def moved(root: Tensor, step: Tensor, rate: float | Tensor, normalize: bool) -> Tensor:
    """``R (I - rate m)`` for a symmetric matrix m, or the row of its diagonal.

    Args:
        root: R.
        step: m, shaped like R.
        rate: a number.
        normalize: whether the rate is divided by the largest absolute row sum of m, if that exceeds
            1. It bounds the eigenvalues of m, so that those of ``I - rate m`` are at least
            ``1 - rate``.
    """
    if normalize:
        size = step.abs() if _is_row(step) else step.abs().sum(-1, keepdim=True)
        rate = rate / size.amax((-2, -1), keepdim=True).clamp_min(1.0)
    return root - rate * (root * step if _is_row(root) else root @ step)


def times_square(x: Tensor, root: Tensor) -> Tensor:
    """``x R R^T`` for rows x, (..., m, n)."""
    return x * root.square() if _is_row(root) else (x @ root) @ root.mT


def _is_row(x: Tensor) -> bool:
    # A 1 x 1 matrix is the row of its diagonal as well.
    return x.shape[-2] == 1
