"""Quadratic models of a loss along a few directions, and how well one of them predicts."""

from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.linalg import treemath
from funcprecond.tree import Params

__all__ = ["gram", "least", "least_in_plane"]


def gram(xs: list[Params], ys: list[Params]) -> Tensor:
    """(len(xs), len(ys)): the inner products of two lists of vectors."""
    return torch.stack([torch.stack([treemath.dot(x, y) for y in ys]) for x in xs])


def least_in_plane(model: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where ``cᵀ model c / 2 + slopesᵀ c`` is least over c = (α, μ), and its value there.

    The second direction counts only if it is another than the first, as far as the dtype can tell.

    Args:
        model: (2, 2), symmetric positive semi-definite.
        slopes: (2,).

    Returns:
        α, μ and the value, 0-d tensors.
    """
    a, b, c = model[0, 0], model[0, 1], model[1, 1]
    determinant = a * c - b * b
    two = determinant > 10 * torch.finfo(model.dtype).eps * a * c
    safe, first = torch.where(two, determinant, 1), torch.where(a > 0, a, 1)
    alpha = torch.where(two, (b * slopes[1] - c * slopes[0]) / safe, -slopes[0] / first)
    mu = torch.where(two, (b * slopes[0] - a * slopes[1]) / safe, 0)
    # At the least point the quadratic term is half of the linear one, with the other sign.
    return alpha, mu, (alpha * slopes[0] + mu * slopes[1]) / 2


def least(attempts: list[Any]) -> Any:
    """Of several trees of one structure the one whose first leaf is least; NaN is worse than any."""
    best = attempts[0]
    for other in attempts[1:]:
        ours, theirs = tree.leaves(best)[0], tree.leaves(other)[0]
        better = (theirs < ours) | ours.isnan()
        best = tree.map(lambda x, y, c=better: torch.where(c, x, y), other, best)
    return best
