"""Minima of quadratic models of a loss along a few directions, and the best of several attempts."""

from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.linalg import treemath
from funcprecond.tree import Params

__all__ = ["gram", "least", "least_in_plane"]


def gram(xs: list[Params], ys: list[Params]) -> Tensor:
    """The inner products of two lists of vectors, (len(xs), len(ys))."""
    return torch.stack([torch.stack([treemath.dot(x, y) for y in ys]) for x in xs])


def least_in_plane(model: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Minimize ``cᵀ model c / 2 + slopesᵀ c`` over c = (α, μ).

    If the two directions are linearly dependent up to rounding, the second one is not used and μ is
    0.

    Args:
        model: (2, 2), symmetric positive semi-definite.
        slopes: (2,).

    Returns:
        The minimizer α and μ, and the minimum, as 0-d tensors.
    """
    a, b, c = model[0, 0], model[0, 1], model[1, 1]
    determinant = a * c - b * b
    two = determinant > 10 * torch.finfo(model.dtype).eps * a * c
    safe, first = torch.where(two, determinant, 1), torch.where(a > 0, a, 1)
    alpha = torch.where(two, (b * slopes[1] - c * slopes[0]) / safe, -slopes[0] / first)
    mu = torch.where(two, (b * slopes[0] - a * slopes[1]) / safe, 0)
    # At the minimizer the quadratic term is minus half of the linear term.
    return alpha, mu, (alpha * slopes[0] + mu * slopes[1]) / 2


def least(attempts: list[Any]) -> Any:
    """The tree with the least first leaf, among trees of equal structure; NaN counts as largest."""
    best = attempts[0]
    for other in attempts[1:]:
        ours, theirs = tree.leaves(best)[0], tree.leaves(other)[0]
        better = (theirs < ours) | ours.isnan()
        best = tree.map(lambda x, y, c=better: torch.where(c, x, y), other, best)
    return best
