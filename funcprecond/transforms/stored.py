"""The storage of a state between steps: another dtype, or half of each symmetric matrix."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.checkpoint import to_dict
from funcprecond.evidence import Evidence
from funcprecond.transform import Transform
from funcprecond.tree import Params, state, static

__all__ = ["Stored", "pack", "stored", "unpack"]


@state
class Stored:
    """The state of a method as it is stored.

    Attributes:
        kept: the state of the method, with converted tensors.
        dtypes: for each tensor of the state, the dtype in which the method computes.
        packed: for each tensor of the state, whether it is the lower triangle of a symmetric
            matrix.
    """

    kept: Any
    dtypes: tuple[torch.dtype, ...] = static()
    packed: tuple[bool, ...] = static()


def stored(
    inner: Transform, dtype: torch.dtype | None, symmetric: Collection[str] = ()
) -> Transform:
    """Store the state of a method in less memory, while each step computes as before.

    With a dtype of unit roundoff u, rounding changes a sum over t steps by at most ``t u``,
    relative to its diagonal, and a moving average by at most ``u / (1 - decay)``. If ``1 - decay``
    is below u, which is 1/256 for bfloat16, a moving average does not change any more.

    Args:
        inner: the method. The structure of its state must not change from step to step.
        dtype: the dtype of floating-point tensors with at least one axis; None keeps their own.
        symmetric: the paths of fields whose matrices are symmetric; they are stored as
            ``n (n + 1) / 2`` entries.

    Returns:
        A transform with the needs of the method; its state is a :class:`Stored`. With neither
        ``dtype`` nor ``symmetric`` it is ``inner`` itself.

    Raises:
        ValueError: ``dtype`` is not a floating-point dtype.
    """
    if dtype is not None and not dtype.is_floating_point:
        msg = f"the dtype of a stored state must be a floating-point dtype, not {dtype}"
        raise ValueError(msg)
    if dtype is None and not symmetric:
        return inner

    def init(params: Params) -> Stored:
        state = inner.init(params)
        named = to_dict(state)
        packed = [
            x.ndim == 2 and any(name.startswith(f"{field}.") for field in symmetric)
            for name, x in named.items()
        ]
        return keep(state, tuple(x.dtype for x in named.values()), tuple(packed))

    def keep(state: Any, dtypes: tuple[torch.dtype, ...], packed: tuple[bool, ...]) -> Stored:
        leaves, structure = tree.flatten(state)
        halves = [pack(x) if p else x for x, p in zip(leaves, packed, strict=True)]
        kept = [x.to(dtype) if x.ndim and x.is_floating_point() else x for x in halves]
        return Stored(tree.unflatten(kept, structure), dtypes, packed)

    def update(
        state: Stored, grads: Params, evidence: Evidence | None = None
    ) -> tuple[Stored, Params]:
        leaves, structure = tree.flatten(state.kept)
        wide = [x.to(d) for x, d in zip(leaves, state.dtypes, strict=True)]
        whole = [unpack(x) if p else x for x, p in zip(wide, state.packed, strict=True)]
        new, direction = inner.update(tree.unflatten(whole, structure), grads, evidence)
        return keep(new, state.dtypes, state.packed), direction

    return Transform(init, update, inner.needs)


def pack(matrix: Tensor) -> Tensor:
    """The lower triangle of a matrix, row by row, (n (n + 1) / 2,)."""
    rows, columns = torch.tril_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns]


def unpack(triangle: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle, (n, n)."""
    n = (math.isqrt(8 * triangle.shape[0] + 1) - 1) // 2
    i = torch.arange(n, device=triangle.device)
    low, high = torch.minimum(i, i[:, None]), torch.maximum(i, i[:, None])
    return triangle[high * (high + 1) // 2 + low]
