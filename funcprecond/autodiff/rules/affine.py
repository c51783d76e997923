"""Affine layers whose second derivatives are computed where they are asked for, and in one piece.

``z = x * w + b``, with any bilinear product *. Its pull-back is linear in the output gradients, so
that the pull-back's own, which is what a product with the Jacobian is made of, is
``v_x * w + x * v_w + v_b``: two products, added up in one place. torch's own rules (2.13) make
three tensors of it for a linear layer, and for a convolution take all terms of a second derivative
together, twice what such a product needs.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from funcprecond.autodiff.rules.backward import Spared, asked

__all__ = ["Layer", "affine"]


class Layer(Protocol):
    """One kind of affine layer: everything about it that is not a tensor."""

    def run(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """``x * w + b``."""
        ...

    def run_both(self, x: Tensor, w: Tensor, y: Tensor, v: Tensor, b: Tensor | None) -> Tensor:
        """``x * w + y * v + b``, added up in place; it is not differentiated."""
        ...

    def pull(self, g: Tensor, x: Tensor, w: Tensor, wanted: Sequence[bool]) -> tuple:
        """Output gradients to those of x, w and b: None for what is not wanted."""
        ...

    def spread(self, b: Tensor, like: Tensor) -> Tensor:
        """The bias at every position of an output."""
        ...


def affine(layer: Layer, x: Tensor, w: Tensor, b: Tensor | None, spared: Spared | None) -> Tensor:
    """``layer.run(x, w, b)``, with the parameters whose gradients may have no value."""
    return _Affine.apply(x, w, b, layer, spared or ())  # pyright: ignore[reportReturnType]


class _Affine(Function):
    @staticmethod
    def forward(ctx, x, w, b, layer, spared):
        ctx.save_for_backward(x, w)
        ctx.layer, ctx.spared = layer, spared
        return layer.run(x, w, b)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        wanted = asked(ctx, 3)
        if not torch.is_grad_enabled():
            # Without a graph to make, a function of its own would only cost time.
            return *ctx.layer.pull(g, x, w, wanted), None, None
        spared = ctx.next_functions[1][0] in ctx.spared
        return *_Pull.apply(g, x, w, ctx.layer, wanted, spared), None, None  # pyright: ignore


class _Pull(Function):
    """Output gradients to those of input, weight and bias, as far as they are wanted."""

    @staticmethod
    def forward(ctx, g, x, w, layer, wanted, spared):
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        ctx.layer = layer
        if not spared:
            return layer.pull(g, x, w, wanted)
        of_x, of_w, of_b = wanted
        for_x, _, for_b = layer.pull(g, x, w, (of_x, False, of_b))
        return for_x, w.new_zeros(()).expand(w.shape) if of_w else None, for_b

    @staticmethod
    def backward(ctx, v_x, v_w, v_b):
        (g, x, w), layer = ctx.saved_tensors, ctx.layer
        of_g, of_x, of_w = asked(ctx, 3)
        for_g = for_x = for_w = None
        if of_g:
            for_g = _pushed(layer, g, x, w, v_x, v_w, v_b)
        if of_x and v_w is not None:
            for_x = layer.pull(g, x, v_w, (True, False, False))[0]
        if of_w and v_x is not None:
            for_w = layer.pull(g, v_x, w, (False, True, False))[1]
        return for_g, for_x, for_w, None, None, None


def _pushed(layer, g, x, w, v_x, v_w, v_b):
    """``v_x * w + x * v_w + v_b``."""
    if v_x is not None and v_w is not None:
        if torch.is_grad_enabled():
            return layer.run(v_x, w, v_b) + layer.run(x, v_w, None)
        return layer.run_both(v_x, w, x, v_w, v_b)
    if v_x is not None:
        return layer.run(v_x, w, v_b)
    if v_w is not None:
        return layer.run(x, v_w, v_b)
    return None if v_b is None else layer.spread(v_b, g)
