"""Functions mapped over lists of tensors, in one batched operation for all tensors of one shape."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["by_shape", "over_stacks"]

# The number of entries of a 64 by 64 matrix.
LARGE = 4096


def by_shape(
    function: Callable[..., Any], *lists: Sequence[Tensor], static: Sequence[Any]
) -> list[Any]:
    """Map ``function(*tensors, static)`` over lists of tensors, with equal shapes in one stack.

    Two entries share a stack if their first tensors have the same shape, dtype and device and if
    they have the same ``static``. On a CPU, a stack of large tensors would save nothing and cost
    copies, so large tensors are passed one by one there.

    Args:
        function: takes tensors with any number of leading axes, and returns a tensor or a tuple of
            tensors with the same leading axes.
        *lists: lists of equal length; call i receives the i-th tensor of each.
        static: the hashable last argument of each call.

    Returns:
        The results in the order of the lists.
    """
    groups: dict[Any, list[int]] = {}
    for i, (x, s) in enumerate(zip(lists[0], static, strict=True)):
        alone = i if x.device.type == "cpu" and x.numel() > LARGE else None
        groups.setdefault((tuple(x.shape), x.dtype, x.device, s, alone), []).append(i)
    results: dict[int, Any] = {}
    for (*_, s, _), indices in groups.items():
        if len(indices) == 1:
            results[indices[0]] = function(*(tensors[indices[0]] for tensors in lists), s)
        else:
            stacks = [torch.stack([tensors[i] for i in indices]) for tensors in lists]
            found = function(*stacks, s)
            alone = isinstance(found, Tensor)
            rows = found.unbind() if alone else zip(*(x.unbind() for x in found), strict=True)
            results |= dict(zip(indices, rows, strict=True))
    return [results[i] for i in range(len(results))]


def over_stacks(
    function: Callable[..., Any], *lists: Sequence[Tensor], static: Sequence[Any]
) -> list[Any]:
    """:func:`by_shape` for a function of single tensors, which is applied to stacks by ``vmap``."""

    def either(*args: Any) -> Any:
        *tensors, (s, ndim) = args
        if tensors[0].ndim == ndim:
            return function(*tensors, s)
        return torch.vmap(lambda *rows: function(*rows, s))(*tensors)

    shaped = [(s, x.ndim) for s, x in zip(static, lists[0], strict=True)]
    return by_shape(either, *lists, static=shaped)
