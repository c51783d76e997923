"""What a state is kept in from one step to the next: another dtype, half of a symmetric matrix."""

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
    """A state as it is kept.

    Attributes:
        kept: the method's state, with other tensors in it.
        dtypes: what each of its tensors is computed in.
        packed: whether it is the lower triangle of a symmetric matrix.
    """

    kept: Any
    dtypes: tuple[torch.dtype, ...] = static()
    packed: tuple[bool, ...] = static()


def stored(
    inner: Transform, dtype: torch.dtype | None, symmetric: Collection[str] = ()
) -> Transform:
    """A method whose state is kept in less memory; each step computes as without.

    Rounding to a dtype of unit roundoff u leaves a sum over t steps within ``t u`` of what it was,
    relative to its diagonal, and a moving average within ``u / (1 - decay)``; where ``1 - decay``
    is below u, 1/256 for bfloat16, it stops moving.

    Args:
        inner: the method; the structure of its state does not change from step to step.
        dtype: of the floating-point tensors with at least one axis; None for their own.
        symmetric: paths of the fields whose matrices are kept as ``n (n + 1) / 2`` entries.

    Raises:
        ValueError: the dtype is not one of floating-point numbers.
    """
    if dtype is not None and not dtype.is_floating_point:
        msg = f"a state is kept in a floating-point dtype, not {dtype}"
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
    """(n (n + 1) / 2,): the lower triangle, row by row."""
    rows, columns = torch.tril_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns]


def unpack(triangle: Tensor) -> Tensor:
    """(n, n): the symmetric matrix with this lower triangle."""
    n = (math.isqrt(8 * triangle.shape[0] + 1) - 1) // 2
    i = torch.arange(n, device=triangle.device)
    low, high = torch.minimum(i, i[:, None]), torch.maximum(i, i[:, None])
    return triangle[high * (high + 1) // 2 + low]
