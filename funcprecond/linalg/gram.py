"""Gram matrices ``X^T X``, without the half of the work that their symmetry makes needless."""

import torch
from torch import Tensor

__all__ = ["bordered", "gram", "is_thin", "square"]

# Blocks along each axis of a Gram matrix, and the fewest columns and products for which they pay.
BLOCKS, WIDE, MANY = 4, 64, 2**25


def gram(rows: Tensor, count: int | None = None) -> Tensor:
    """``rows^T rows``, in 5/8 of the multiplications of a general product.

    Args:
        rows: (..., M, n).
        count: M, if the rows are to have a 1 appended, see :func:`bordered`.

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
    """The Gram matrix of rows with a 1 appended, from that of the rows themselves.

    Args:
        moment: (..., n, n), the Gram matrix of the rows.
        sums: (..., n), the sum of the rows.
        count: how many rows there are.

    Returns:
        (..., n + 1, n + 1).
    """
    corner = torch.full_like(sums[..., :1], count)
    right = torch.cat([sums, corner], -1).unsqueeze(-1)
    return torch.cat([torch.cat([moment, sums.unsqueeze(-2)], -2), right], -1)


def is_thin(factor: Tensor) -> bool:
    """Whether a symmetric (n, n) factor is kept as fewer rows X, (r, n), that stand for ``X^T X``."""
    return factor.ndim > 1 and factor.shape[-2] < factor.shape[-1]


def square(factor: Tensor) -> Tensor:
    """A factor as a square matrix, formed if it :func:`is_thin`; a diagonal (n,) as it is."""
    return gram(factor) if is_thin(factor) else factor
