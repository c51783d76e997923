"""ReLU and max-pooling, whose second derivative is zero and of which nothing is computed.

torch's own rules (2.13) fill a tensor of the input's size with zeros, which is then added to what
comes from elsewhere: a tenth of a Hessian product of a small convolutional network.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from funcprecond.tracing import is_watched

__all__ = ["max_pool2d", "relu"]


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu``; torch's own in place, and where :func:`is_watched`."""
    if inplace or is_watched():
        return F.relu(input, inplace)
    return _Relu.apply(input)  # pyright: ignore[reportReturnType]


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """``F.max_pool2d``; torch's own with indices, and where :func:`is_watched`."""
    if return_indices or is_watched():
        options = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return F.max_pool2d(input, *options)  # pyright: ignore
    axes = (kernel_size, stride or (), padding, dilation)
    per_axis = [[o] if isinstance(o, int) else list(o) for o in axes]
    return _MaxPool.apply(input, (*per_axis, ceil_mode))


class _Relu(Function):
    @staticmethod
    def forward(ctx, x):
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return _masked(g, *ctx.saved_tensors)


class _Masked(Function):
    """Output gradients where the output is positive: its own transpose."""

    @staticmethod
    def forward(ctx, g, y):
        ctx.save_for_backward(y)
        return torch.ops.aten.threshold_backward(g, y, 0)

    @staticmethod
    def backward(ctx, v):
        return _masked(v, *ctx.saved_tensors), None


def _masked(g, y):
    # Without a graph to make, a function of its own would only cost time.
    if torch.is_grad_enabled():
        return _Masked.apply(g, y)
    return torch.ops.aten.threshold_backward(g, y, 0)


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
    """Output gradients put where each maximum was; the transpose takes what is there."""

    @staticmethod
    def forward(ctx, g, x, places, geometry):
        ctx.save_for_backward(places)
        return torch.ops.aten.max_pool2d_with_indices_backward(g, x, *geometry, places)

    @staticmethod
    def backward(ctx, v):
        (places,) = ctx.saved_tensors
        taken = v.flatten(-2).gather(-1, places.flatten(-2)).reshape(places.shape)
        return taken, None, None, None
