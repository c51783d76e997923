"""ReLU and max-pooling, whose second derivative is zero and of which nothing is computed.

torch's own rules (2.13) fill a tensor of the input's size with zeros, which is then added to what
comes from elsewhere: a tenth of a Hessian product of a small convolutional network.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from funcprecond.watched import is_watched

__all__ = ["max_pool2d", "relu"]


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu``; torch's own in place, and where :func:`is_watched`."""
    if inplace or is_watched():
        return F.relu(input, inplace)
    return _Relu.apply(input)  # pyright: ignore[reportReturnType]


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``torch.max_pool2d``; torch's own where :func:`is_watched`."""
    if is_watched():
        return torch.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    per_axis = [[o] if isinstance(o, int) else list(o) for o in (kernel_size, stride, padding)]
    dilation = [dilation] if isinstance(dilation, int) else list(dilation)
    return _MaxPool.apply(input, (*per_axis, dilation, ceil_mode))  # pyright: ignore


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
