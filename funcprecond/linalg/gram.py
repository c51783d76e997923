"""Gram matrices ``X^T X``, computed with less work than a general product, by their symmetry."""

import torch
from torch import Tensor

__all__ = ["bordered", "gram", "is_thin", "square"]

# The number of blocks along each axis of a Gram matrix, and the smallest numbers of columns and of
# multiplications for which blocks are faster.
BLOCKS, WIDE, MANY = 4, 64, 2**25


def gram(rows: Tensor, count: int | None = None) -> Tensor:
    """``rows^T rows``; a large product takes 5/8 of the multiplications of a general product.

    Args:
        rows: (..., M, n).
        count: M, if a column of ones is to be appended to ``rows``, see :func:`bordered`; None
            appends nothing.

    Returns:
        (..., n, n), or (..., n + 1, n + 1) with ``count``.
    """
    n, sums = rows.shape[-1], None if count is None else rows.sum(-2)
    if n < WIDE or rows.shape[-2] * n * n < MANY:
        moment = rows.mT @ rows
        return moment if count is None or sums is None else bordered(moment, sums, count)
    size = -(-n // BLOCKS)
    above = [rows[..., i : i + size].mT @ rows[..., i:] for i in range(0, n, size)]
    lines = []
    for i, line in enumerate(above):
        width = line.shape[-2]
        left = [above[j].narrow(-1, (i - j) * size, width).mT for j in range(i)]
        right = [] if sums is None else [sums.narrow(-1, i * size, width).unsqueeze(-1)]
        lines.append(torch.cat([*left, line, *right], -1))
    if count is not None and sums is not None:
        lines.append(torch.cat([sums, torch.full_like(sums[..., :1], count)], -1).unsqueeze(-2))
    return torch.cat(lines, -2)


def bordered(moment: Tensor, sums: Tensor, count: int) -> Tensor:
    """The Gram matrix of ``[X, 1]``, from the Gram matrix and the column sums of X.

    Args:
        moment: (..., n, n), the Gram matrix of X.
        sums: (..., n), the sum of the rows of X.
        count: the number of rows of X.

    Returns:
        (..., n + 1, n + 1).
    """
    corner = torch.full_like(sums[..., :1], count)
    right = torch.cat([sums, corner], -1).unsqueeze(-1)
    return torch.cat([torch.cat([moment, sums.unsqueeze(-2)], -2), right], -1)


def is_thin(factor: Tensor) -> bool:
    """Whether a factor is stored as X, (r, n) with r < n, and stands for ``X^T X``, (n, n)."""
    return factor.ndim > 1 and factor.shape[-2] < factor.shape[-1]


def square(factor: Tensor) -> Tensor:
    """A factor as a square matrix, formed if it :func:`is_thin`; a diagonal (n,) stays as it is."""
    return gram(factor) if is_thin(factor) else factor
