"""GELU with a second derivative that is computed in few passes, and kept for further products.

torch 2.13 computes this derivative with about twenty element-wise operations, and again for every
product with the Hessian. In a small model, this takes more time than the matrix products.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from funcprecond.autodiff.rules.backward import asked
from funcprecond.tracing import is_traced

__all__ = ["gelu"]


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Compute ``F.gelu``, with torch's own derivatives if it is traced or an approximation."""
    if is_traced() or approximate != "none":
        return F.gelu(input, approximate=approximate)
    return _Gelu.apply(input)  # pyright: ignore[reportReturnType]


class _Gelu(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.slope = _Slope()
        return F.gelu(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _GeluPull.apply(g, x, ctx.slope)
        return ctx.slope.times(g, x)


class _GeluPull(Function):
    """The pull-back of GELU: output gradients times the first derivative."""

    @staticmethod
    def forward(ctx, g, x, slope):
        ctx.save_for_backward(g, x)
        ctx.slope, ctx.bend, ctx.again = slope, None, False
        return slope.times(g, x)

    @staticmethod
    def backward(ctx, v):
        g, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _GeluPull.apply(v, x, ctx.slope), v * g * _bend(x), None
        of_g, of_x = asked(ctx, 2)
        for_x = None
        if of_x:
            bend = _bend(x).mul_(g) if ctx.bend is None else ctx.bend
            # Kept from the second product on, because a single product does not use it again.
            ctx.bend, ctx.again = (bend if ctx.again else None), True
            for_x = v * bend
        return ctx.slope.times(v, x) if of_g else None, for_x, None


class _Slope:
    """The first derivative, which is kept after more uses than a single product makes."""

    def __init__(self):
        self.value, self.uses = None, 0

    def times(self, g: Tensor, x: Tensor) -> Tensor:
        self.uses += 1
        if self.uses > 3 and self.value is None:
            self.value = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
        return torch.ops.aten.gelu_backward(g, x) if self.value is None else g * self.value


def _bend(x: Tensor) -> Tensor:
    """The second derivative, ``(2 - x^2)`` times the standard normal density, in four passes."""
    log_scale, two = x.new_full((), -0.5 * math.log(2 * math.pi)), x.new_full((), 2.0)
    density = torch.addcmul(log_scale, x, x, value=-0.5).exp_()
    return density * torch.addcmul(two, x, x, value=-1)
