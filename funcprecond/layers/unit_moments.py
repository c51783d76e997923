"""Second moments of per-sample gradients for each output unit of an affine layer.

The gradient of example n in the incoming parameters of unit o is ``p_no = Σ_t g_nto [a_nt, 1]``, a
sum over its positions t, and over all uses of a shared weight, before any product is taken.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from funcprecond.layers.example_gradients import ExampleGradients

__all__ = ["unit_borders", "unit_moments"]

# The number of entries of the gradients of units that are in memory at a time.
CHUNK = 2**22


def unit_moments(rows: ExampleGradients) -> Tensor:
    """Compute ``Σ p_o p_o^T`` for each unit, summed over cotangents and examples.

    Args:
        rows: the rows of a layer whose inputs are not one-hot.

    Returns:
        (U, i, i) for the U = J o units of all groups, with i + 1 in place of i if there is a bias.
    """
    return torch.cat([p.mT @ p for p in _units(rows)])


def unit_borders(rows: ExampleGradients) -> Tensor:
    """Compute the diagonal and, with a bias, the last row of :func:`unit_moments`.

    Args:
        rows: see :func:`unit_moments`.

    Returns:
        (U, 2, i + 1): the diagonal, and the products of the bias with each parameter, of which the
        last is the bias's own. Without a bias (U, 1, i), the diagonal.
    """
    parts = []
    for p in _units(rows):
        border = [p.square().sum(1)]
        if rows.bias is not None:
            border.append((p * p[..., -1:]).sum(1))
        parts.append(torch.stack(border, 1))
    return torch.cat(parts)


def _units(rows: ExampleGradients) -> Iterator[Tensor]:
    """The gradients of all examples in the parameters of a few units at a time, (u, V N, i)."""
    groups, v, n, _, o = rows.grads.shape
    size = max(1, CHUNK // (v * n * rows.inputs.shape[-1]))
    for j in range(groups):
        for start in range(0, o, size):
            g = rows.grads[j, ..., start : start + size]
            yield torch.einsum("vntu,nti->uvni", g, rows.inputs[j]).flatten(1, 2)
