"""Max-pooling, whose second derivative is zero and is not computed.

See :mod:`funcprecond.autodiff.rules.relu`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from funcprecond.tracing import is_traced

__all__ = ["max_pool2d"]


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Compute ``F.max_pool2d``, with torch's own derivatives if it is traced or returns indices."""
    if return_indices or is_traced():
        options = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return F.max_pool2d(input, *options)  # pyright: ignore
    axes = (kernel_size, stride or (), padding, dilation)
    per_axis = [[o] if isinstance(o, int) else list(o) for o in axes]
    return _MaxPool.apply(input, (*per_axis, ceil_mode))


class _MaxPool(Function):
    @staticmethod
    def forward(ctx, x, geometry):
        y, places = torch.ops.aten.max_pool2d_with_indices(x, *geometry)
        ctx.save_for_backward(x, places)
        ctx.geometry = geometry
        return y

    @staticmethod
    def backward(ctx, g):
        x, places = ctx.saved_tensors
        return _Placed.apply(g, x, places, ctx.geometry), None


class _Placed(Function):
    """The pull-back, which puts each output gradient at the place of the maximum.

    Its own pull-back takes the entries at these places.
    """

    @staticmethod
    def forward(ctx, g, x, places, geometry):
        ctx.save_for_backward(places)
        return torch.ops.aten.max_pool2d_with_indices_backward(g, x, *geometry, places)

    @staticmethod
    def backward(ctx, v):
        (places,) = ctx.saved_tensors
        taken = v.flatten(-2).gather(-1, places.flatten(-2)).reshape(places.shape)
        return taken, None, None, None
