"""A linear layer whose second derivatives are computed where they are asked for, and in one piece.

Its pull-back ``(g W, g^T x, sum g)`` is linear in g, so that the pull-back's own, which is what a
product with the Jacobian is made of, is ``v_x W^T + x v_W^T + v_b``: two matrix products added up
in one place. torch's own rule (2.13) makes three tensors of it, one for each and one for their sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from funcprecond.second_derivatives import Spared, asked
from funcprecond.watched import is_watched

__all__ = ["linear"]


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, spared: Spared | None = None
) -> Tensor:
    """``F.linear`` of the same arguments, with the parameters whose gradients may have no value.

    Under a transform, a compiler, forward mode or autocast, and of complex numbers, it is torch's
    own.
    """
    plain = input.ndim > 1 and weight.ndim == 2 and input.dtype == weight.dtype
    if not plain or input.is_complex() or is_watched() or torch._C._is_any_autocast_enabled():
        return F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias, spared or ())  # pyright: ignore[reportReturnType]


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, w, b, spared):
        ctx.save_for_backward(x, w)
        ctx.spared = spared
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        wanted = asked(ctx, 3)
        if not torch.is_grad_enabled():
            # Without a graph to make, a function of its own would only cost time.
            return *_pulled(g, x, w, wanted), None
        spared = ctx.next_functions[1][0] in ctx.spared
        return *_Pull.apply(g, x, w, wanted, spared), None  # pyright: ignore


class _Pull(Function):
    """Output gradients to those of input, weight and bias, as far as they are wanted."""

    @staticmethod
    def forward(ctx, g, x, w, wanted, spared):
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        if not spared:
            return _pulled(g, x, w, wanted)
        of_x, of_w, of_b = wanted
        for_x, _, for_b = _pulled(g, x, w, (of_x, False, of_b))
        return for_x, w.new_zeros(()).expand(w.shape) if of_w else None, for_b

    @staticmethod
    def backward(ctx, v_x, v_w, v_b):
        g, x, w = ctx.saved_tensors
        of_g, of_x, of_w = asked(ctx, 3)
        for_g = for_x = for_w = None
        if of_g:
            for_g = _pushed(x, w, v_x, v_w, v_b)
        if of_x and v_w is not None:
            for_x = g @ v_w
        if of_w and v_x is not None:
            for_w = g.flatten(0, -2).mT @ v_x.flatten(0, -2)
        return for_g, for_x, for_w, None, None


def _pulled(g, x, w, wanted):
    of_x, of_w, of_b = wanted
    rows = g.flatten(0, -2)
    return (
        g @ w if of_x else None,
        rows.mT @ x.flatten(0, -2) if of_w else None,
        rows.sum(0) if of_b else None,
    )


def _pushed(x, w, v_x, v_w, v_b):
    """``v_x W^T + x v_W^T + v_b``."""
    if v_x is not None and v_w is not None:
        if torch.is_grad_enabled():
            return F.linear(v_x, w, v_b) + F.linear(x, v_w)
        rows = F.linear(v_x.flatten(0, -2), w, v_b).addmm_(x.flatten(0, -2), v_w.mT)
        return rows.unflatten(0, x.shape[:-1])
    if v_x is not None:
        return F.linear(v_x, w, v_b)
    if v_w is not None:
        return F.linear(x, v_w, v_b)
    return None if v_b is None else v_b.expand(*x.shape[:-1], -1)
