"""A convolution whose second derivatives are computed where they are asked for, and only there.

A convolution and its two transposes, in its input and in its kernel, are bilinear, and each is a
derivative of the others. torch's own rule (2.13) takes all of a second derivative's terms together,
so that a product with the Jacobian, which is one of three, costs twice what it needs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from funcprecond.second_derivatives import Spared, asked
from funcprecond.watched import is_watched

__all__ = ["convolve"]


def convolve(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    spared: Spared | None = None,
) -> Tensor:
    """``function``, one of ``F.conv1d``, ``conv2d`` and ``conv3d``, of the same arguments.

    Args:
        function, input, weight, bias, stride, padding, dilation, groups: torch's.
        spared: the parameters whose gradients may have no value.

    Under a transform, a compiler or forward mode it is torch's own.
    """
    if is_watched() or input.ndim != weight.ndim or isinstance(padding, str):
        return function(input, weight, bias, stride, padding, dilation, groups)
    dims = weight.ndim - 2
    per_axis = [
        (o,) * dims if isinstance(o, int) else tuple(o) for o in (stride, padding, dilation)
    ]
    geometry = (*per_axis, False, (0,) * dims, groups)
    return _Convolution.apply(input, weight, bias, geometry, spared or ())


class _Convolution(Function):
    @staticmethod
    def forward(ctx, x, w, b, geometry, spared):
        ctx.save_for_backward(x, w)
        ctx.geometry, ctx.spared = geometry, spared
        return torch.convolution(x, w, b, *geometry)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        of_x, of_w, of_b = asked(ctx, 3)
        spared = torch.is_grad_enabled() and ctx.next_functions[1][0] in ctx.spared
        return (
            _Input.apply(g, w, x.shape, ctx.geometry) if of_x else None,
            _Kernel.apply(g, x, w.shape, ctx.geometry, spared) if of_w else None,
            g.sum((0, *range(2, g.ndim))) if of_b else None,
            None,
            None,
        )


class _Input(Function):
    """The transpose in the input: output gradients and kernel to input gradients."""

    @staticmethod
    def forward(ctx, g, w, shape, geometry):
        ctx.save_for_backward(g, w)
        ctx.geometry = geometry
        mask = [True, False, False]
        return torch.ops.aten.convolution_backward(g, g.new_empty(shape), w, None, *geometry, mask)[
            0
        ]

    @staticmethod
    def backward(ctx, v):
        g, w = ctx.saved_tensors
        of_g, of_w = asked(ctx, 2)
        return (
            _Convolution.apply(v, w, None, ctx.geometry, ()) if of_g else None,
            _Kernel.apply(g, v, w.shape, ctx.geometry, False) if of_w else None,
            None,
            None,
        )


class _Kernel(Function):
    """The transpose in the kernel: output gradients and inputs to kernel gradients."""

    @staticmethod
    def forward(ctx, g, x, shape, geometry, spared):
        ctx.save_for_backward(g, x)
        ctx.geometry = geometry
        if spared:
            return x.new_zeros(()).expand(shape)
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(g, x, x.new_empty(shape), None, *geometry, mask)[
            1
        ]

    @staticmethod
    def backward(ctx, v):
        g, x = ctx.saved_tensors
        of_g, of_x = asked(ctx, 2)
        return (
            _Convolution.apply(x, v, None, ctx.geometry, ()) if of_g else None,
            _Input.apply(g, v, x.shape, ctx.geometry) if of_x else None,
            None,
            None,
            None,
        )
