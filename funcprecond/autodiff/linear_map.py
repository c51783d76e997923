"""Linear maps that are computed outside of any graph, and can be differentiated in their argument.

A product with a graph that is kept, ``J^T u`` or ``H v``, asks autograd for a gradient without a
graph of its own. Where somebody differentiates the result in the vector, its derivative is the same
map, and its pull-back is the adjoint map.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from funcprecond.tracing import is_differentiated

__all__ = ["Map", "linear_map"]

Map = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def linear_map(product: Map, adjoint: Map, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Compute ``product(tensors)``.

    Args:
        product: a linear function of a list of tensors.
        adjoint: its adjoint, from a list like the results to one like the tensors.
        tensors: the argument.

    Returns:
        The results, which can be differentiated in ``tensors`` to any order.
    """
    if not is_differentiated(tensors):
        return product(tensors)
    return _LinearMap.apply(product, adjoint, *tensors)  # pyright: ignore[reportReturnType]


class _LinearMap(Function):
    @staticmethod
    def forward(product: Map, adjoint: Map, *tensors):
        return tuple(product(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs, output):
        ctx.product, ctx.adjoint, *tensors = inputs
        ctx.shapes = [(x.shape, x.dtype, x.device) for x in tensors]

    @staticmethod
    def backward(ctx: Any, *cotangents):
        return None, None, *linear_map(ctx.adjoint, ctx.product, cotangents)

    @staticmethod
    def jvp(ctx: Any, _product, _adjoint, *tangents):
        filled = [
            torch.zeros(shape, dtype=dtype, device=device) if x is None else x
            for x, (shape, dtype, device) in zip(tangents, ctx.shapes, strict=True)
        ]
        return tuple(linear_map(ctx.product, ctx.adjoint, filled))

    @staticmethod
    def vmap(info: Any, in_dims, product: Map, adjoint: Map, *tensors):
        stacks = [
            x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
            for x, axis in zip(tensors, in_dims[2:], strict=True)
        ]

        def of_stacks(single: Map) -> Map:
            def one(*parts: Any) -> tuple[Tensor, ...]:
                return tuple(single(parts))

            return lambda given: torch.vmap(one)(*given)

        found = tuple(linear_map(of_stacks(product), of_stacks(adjoint), stacks))
        return found, (0,) * len(found)
