"""A convolution whose second derivatives are computed where they are asked for, and in one piece.

A convolution and its two transposes, in its input and in its kernel, are bilinear, and each is a
derivative of the others. So the pull-back's own pull-back, which is what a product with the
Jacobian is made of, is ``v_x * w + x * v_w + v_b``: two convolutions added up in one place. torch's
own rule (2.13) takes all of a second derivative's terms together, twice what such a product needs.
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
        wanted = asked(ctx, 3)
        if not torch.is_grad_enabled():
            # Without a graph to make, a function of its own would only cost time.
            return *_pulled(g, x, w, ctx.geometry, wanted), None, None
        spared = ctx.next_functions[1][0] in ctx.spared
        return *_Pull.apply(g, x, w, ctx.geometry, wanted, spared), None, None  # pyright: ignore


class _Pull(Function):
    """Output gradients to those of input, kernel and bias, as far as they are wanted."""

    @staticmethod
    def forward(ctx, g, x, w, geometry, wanted, spared):
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        if not spared:
            return _pulled(g, x, w, geometry, wanted)
        of_x, of_w, of_b = wanted
        for_x, _, for_b = _pulled(g, x, w, geometry, (of_x, False, of_b))
        return for_x, w.new_zeros(()).expand(w.shape) if of_w else None, for_b

    @staticmethod
    def backward(ctx, v_x, v_w, v_b):
        g, x, w = ctx.saved_tensors
        of_g, of_x, of_w = asked(ctx, 3)
        for_g = for_x = for_w = None
        if of_g:
            for_g = _pushed(g, x, w, v_x, v_w, v_b, ctx.geometry)
        if of_x and v_w is not None:
            for_x = _pulled(g, x, v_w, ctx.geometry, (True, False, False))[0]
        if of_w and v_x is not None:
            for_w = _pulled(g, v_x, w, ctx.geometry, (False, True, False))[1]
        return for_g, for_x, for_w, None, None, None


def _pulled(g, x, w, geometry, wanted):
    of_x, of_w, of_b = wanted
    for_x, for_w, _ = torch.ops.aten.convolution_backward(
        g, x, w, None, *geometry, [of_x, of_w, False]
    )
    return for_x, for_w, g.sum((0, *range(2, g.ndim))) if of_b else None


def _pushed(g, x, w, v_x, v_w, v_b, geometry):
    """``v_x * w + x * v_w + v_b``."""
    if v_x is not None and v_w is not None:
        first = torch.convolution(x, v_w, v_b, *geometry)
        second = torch.convolution(v_x, w, None, *geometry)
        return first + second if torch.is_grad_enabled() else first.add_(second)
    if v_x is not None:
        return torch.convolution(v_x, w, v_b, *geometry)
    if v_w is not None:
        return torch.convolution(x, v_w, v_b, *geometry)
    return None if v_b is None else v_b.reshape(-1, *[1] * (g.ndim - 2)).expand(g.shape)
