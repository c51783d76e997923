"""Stacks of gradients as the rows X of ``C = X^T X``, with their Gram matrices.

All functions take any number of leading axes, such as one for the units of a layer.
"""

import torch
from torch import Tensor

from funcprecond.linalg.eigh import separated_eigh
from funcprecond.linalg.precision import decomposition_dtype

__all__ = ["put_row", "truncate"]


def put_row(stacked: Tensor, dots: Tensor, row: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
    """Put a gradient in the place of a row.

    Args:
        stacked: the rows, (..., R, P).
        dots: their inner products, (..., R, R).
        row: the gradient, (..., P).
        here: (R,), True at the row to replace.

    Returns:
        The new rows and inner products.
    """
    stacked = torch.where(here.unsqueeze(1), row.unsqueeze(-2), stacked)
    products = (stacked @ row.unsqueeze(-1)).squeeze(-1)
    dots = torch.where(here.unsqueeze(1), products.unsqueeze(-2), dots)
    return stacked, torch.where(here, products.unsqueeze(-1), dots)


def truncate(
    stacked: Tensor, dots: Tensor, weights: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the largest eigenvalues of ``C = X^T diag(w) X``.

    Args:
        stacked, dots: X, (..., R, P), and the inner products of its rows, (..., R, R).
        weights: w, (R,).
        rank: k, the number of eigenvalues that are kept.

    Returns:
        New rows, inner products and weights. The first k rows are the eigenvectors of C times the
        roots of their eigenvalues, with weights of 1, and the others are zero.
    """
    roots = weights.sqrt()
    gram = dots * roots * roots.unsqueeze(1)
    wide = ((gram + gram.mT) / 2).to(decomposition_dtype(gram))
    values, vectors = separated_eigh(wide, 10 * torch.finfo(wide.dtype).eps)
    values = values[..., -rank:].clamp_min(0.0).to(gram.dtype)
    turned = (vectors[..., -rank:].mT.to(gram.dtype) * roots) @ stacked
    kept = torch.arange(len(weights), device=weights.device) < rank
    padding = torch.zeros_like(dots[..., rank:, 0])
    return (
        torch.cat([turned, torch.zeros_like(stacked[..., rank:, :])], -2),
        torch.diag_embed(torch.cat([values, padding], -1)),
        kept.to(weights.dtype),
    )
