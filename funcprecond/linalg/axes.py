"""Gram matrices of a tensor along its axes, and products with one matrix per axis.

Neighboring axes of a few entries, such as those of a convolution's kernel, are processed together
in one pass over memory: the Gram matrix of both axes contains that of each as a partial trace, and
the Kronecker product of their matrices is one matrix.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from funcprecond.tracing import multi_tensor

__all__ = [
    "along",
    "axes_below",
    "axes_of",
    "grams",
    "mode_gram",
    "mode_product",
    "multiply",
    "symmetric",
]

# Neighboring axes with at most this many entries together are cheaper as one axis.
TOGETHER = 32
# A symmetric product of more rows than this is computed this many rows at a time.
ROWS = 128


def grams(x: Tensor, axes: Sequence[int]) -> tuple[Tensor, ...]:
    """``unfold_i(x) unfold_i(x)^T``, (n_i, n_i), for each of the given axes, in ascending order."""
    found = []
    for run in _runs(x.shape, axes):
        if run[0] in axes:
            sizes = x.shape[run[0] : run[-1] + 1]
            gram = _gram(x.reshape(math.prod(x.shape[: run[0]]), math.prod(sizes), -1))
            found += [gram] if len(run) == 1 else _partial_traces(gram, sizes)
    return tuple(found)


def multiply(matrices: Sequence[Tensor], x: Tensor, axes: Sequence[int]) -> Tensor:
    """``x ×_i M_i``: axis i of x contracted with the second axis of M_i, (n_i, n_i), for each i.

    Each product moves the first axis to the end, which costs nothing, and leaves the next axis
    where it can be multiplied without a copy.
    """
    of = dict(zip(axes, matrices, strict=True))
    if not of:
        return x
    y = x
    for run in _runs(x.shape, axes):
        y = y.reshape(math.prod([x.shape[i] for i in run]), -1)
        if run[0] not in of:
            y = y.mT
            continue
        matrix = functools.reduce(torch.kron, [of[i] for i in run])
        # Writing few rows is several times faster than writing few columns, even with a copy later.
        y = (matrix @ y).mT if len(y) <= TOGETHER else y.mT @ matrix.mT
    return y.reshape(x.shape).contiguous()


def mode_product(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """Contract ``axis`` of ``x`` with axis 1 of ``matrix``; the axis stays in place."""
    if x.ndim == 2:
        return matrix @ x if axis == 0 else x @ matrix.mT
    product = torch.tensordot(matrix, x, ([1], [axis]))  # pyright: ignore[reportArgumentType]
    return product.movedim(0, axis)


def mode_gram(tensor: Tensor, axis: int) -> Tensor:
    """The Gram matrix of the slices along ``axis``, (n_axis, n_axis)."""
    return grams(tensor, (axis,))[0]


def axes_of(shape: torch.Size) -> tuple[int, ...]:
    """The axes that have a factor: those longer than 1, if there are two or more and none is empty.

    An axis of length 1 does not count, because it would take a share of the exponent: an (n, 1)
    matrix is a vector.
    """
    axes = tuple(i for i, n in enumerate(shape) if n > 1)
    return axes if len(axes) > 1 and 0 not in shape else ()


def axes_below(shape: torch.Size, max_dim: int) -> tuple[int, ...]:
    """The axes of :func:`axes_of` that are at most ``max_dim`` long; 0 means no limit."""
    return tuple(i for i in axes_of(shape) if not max_dim or shape[i] <= max_dim)


def symmetric(rows: Tensor) -> Tensor:
    """``rows rows^T`` of a matrix or a stack, for little more than half the cost if it is large."""
    n = rows.shape[-2]
    large = rows.ndim == 2 and n > ROWS and rows.device.type == "cpu"
    if not large or torch.compiler.is_compiling() or not multi_tensor((rows,)):
        return rows @ rows.mT
    out = rows.new_empty((n, n))
    for i in range(0, n, ROWS):
        end = min(i + ROWS, n)
        torch.mm(rows[i:end], rows[:end].mT, out=out[i:end, :end])
        out[:i, i:end] = out[i:end, :i].mT
    return out


def _runs(shape: Sequence[int], axes: Sequence[int]) -> list[tuple[int, ...]]:
    """All axes in order, where neighbors that are processed together share one tuple."""
    runs: list[tuple[int, ...]] = []
    for i, n in enumerate(shape):
        last = runs[-1] if runs else ()
        inside = i in axes and bool(last) and last[-1] in axes
        if inside and n * math.prod([shape[j] for j in last]) <= TOGETHER:
            runs[-1] = (*last, i)
        else:
            runs.append((i,))
    return runs


def _gram(x: Tensor) -> Tensor:
    """The Gram matrix along the middle axis of a tensor with three axes."""
    if x.shape[0] == 1:
        return symmetric(x[0])
    if x.shape[2] == 1:
        return symmetric(x[..., 0].mT)
    return symmetric(x.movedim(1, 0).flatten(1))


def _partial_traces(gram: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The Gram matrix of each axis, from the Gram matrix over several axes."""
    k = len(sizes)
    both = gram.reshape(*sizes, *sizes)
    return [
        torch.einsum(both, [*range(k), *(k if j == i else j for j in range(k))], [i, k])
        for i in range(k)
    ]


def along(vectors: tuple[Tensor, ...], axes: tuple[int, ...], like: Tensor) -> Tensor:
    """The outer product of vectors along some axes of a tensor, shaped to broadcast with it."""
    product = torch.ones((), dtype=like.dtype, device=like.device)
    for v, axis in zip(vectors, axes, strict=True):
        product = product * v.reshape([-1 if i == axis else 1 for i in range(like.ndim)])
    return product
