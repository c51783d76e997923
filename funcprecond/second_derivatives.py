"""GELU and layer norm whose second derivatives are computed once, where they are asked for.

torch's own rules (2.13) write them out in some twenty element-wise operations, all of them at each
product; a kept product would spend more time there than in a small model's matrix products.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from funcprecond import tree

__all__ = ["asked", "gelu", "is_watched", "layer_norm"]


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``F.gelu``; torch's own for the approximation, and where :func:`is_watched`."""
    if is_watched() or approximate != "none":
        return F.gelu(input, approximate=approximate)
    return _Gelu.apply(input)  # pyright: ignore[reportReturnType]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm``, to be differentiated twice and not more; torch's own if it is watched."""
    if is_watched():
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    out = _Normalised.apply(input, list(normalized_shape), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias  # pyright: ignore[reportReturnType]


def is_watched() -> bool:
    """Whether a transform, a compiler or forward mode wants torch's own rules."""
    return torch.compiler.is_compiling() or tree.in_transform() or forward_ad._current_level >= 0


def asked(ctx, count: int) -> list[bool]:
    """For each of the first arguments, whether this very backward pass needs its gradient."""
    nodes = [node for node, _ in ctx.next_functions[:count]]
    needed = [*map(_is_executed, nodes)] + [False] * (count - len(nodes))
    return [a and b for a, b in zip(needed, ctx.needs_input_grad, strict=False)]


def _is_executed(node) -> bool:
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)  # pyright: ignore
    except RuntimeError:
        # torch does not answer for a leaf, and is only asked to where the leaf is wanted.
        return True


class _Gelu(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.slope = None
        return F.gelu(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return g * _Slope.apply(x)
        if ctx.slope is None:
            ctx.slope = _slope(x)
        return g * ctx.slope


class _Slope(Function):
    """The first derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.bend = None
        return _slope(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return g * _bend(x)
        if ctx.bend is None:
            ctx.bend = _bend(x)
        return g * ctx.bend


def _slope(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x)


def _bend(x: Tensor) -> Tensor:
    """The second derivative, ``(2 - x^2)`` times the standard normal density."""
    squares = x * x
    return (squares * -0.5).exp() * (2 - squares) / math.sqrt(2 * math.pi)


class _Normalised(Function):
    """``(x - mean) / deviation`` over the last axes."""

    @staticmethod
    def forward(ctx, x, shape, eps):
        out, mean, inverse = torch.native_layer_norm(x, shape, None, None, eps)
        ctx.save_for_backward(x, mean, inverse)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx, g):
        return _Centred.apply(g, *ctx.saved_tensors, ctx.shape), None, None


class _Centred(Function):
    """The pull-back ``R(g) = r (g - <g> - y <g y>)``, with y normalised and <> the mean.

    It is its own transpose in g; in x that of v is ``R(-r (<g y> v + <v y> g)) - r^2 E y``, with
    ``E = <v g> - <v> <g> - <g y> <v y>``.
    """

    @staticmethod
    def forward(ctx, g, x, mean, inverse, shape):
        ctx.save_for_backward(g, x, mean, inverse)
        ctx.shape = shape
        return _centred(g, x, mean, inverse, shape)

    @staticmethod
    def backward(ctx, v):
        if torch.is_grad_enabled():
            msg = "layer norm is differentiated twice here, and a third time was asked for"
            raise NotImplementedError(msg)
        g, x, mean, inverse = ctx.saved_tensors
        of_g, of_x = asked(ctx, 2)
        for_g = _centred(v, x, mean, inverse, ctx.shape) if of_g else None
        for_x = None
        if of_x:
            axes = tuple(range(-len(ctx.shape), 0))
            y = (x - mean) * inverse

            def average(a, b):
                return (a * b).mean(axes, keepdim=True)

            gy, vy = average(g, y), average(v, y)
            within = average(v, g) - v.mean(axes, True) * g.mean(axes, True) - gy * vy
            turned = torch.addcmul(gy * v, vy, g) * -inverse
            for_x = _centred(turned, x, mean, inverse, ctx.shape) - inverse**2 * within * y
        return for_g, for_x, None, None, None


def _centred(g, x, mean, inverse, shape):
    mask = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(
        g.contiguous(), x, shape, mean, inverse, None, None, mask
    )[0]
