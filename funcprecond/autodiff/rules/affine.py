"""Affine layers that compute only the requested second derivatives, without temporary sums.

An affine layer is ``z = x * w + b``, with any bilinear product ``*``. Its pull-back maps output
gradients to the gradients of x, w and b, and is linear in the output gradients. The pull-back of
this map, of which products with the Jacobian consist, is ``v_x * w + x * v_w + v_b``: two products
that are added into one tensor. torch 2.13 allocates three tensors for it in a linear layer. In a
convolution, it computes all terms of the second derivative together, twice as many as such a
product needs.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from funcprecond.autodiff.rules.backward import Spared, asked

__all__ = ["Layer", "affine"]


class Layer(Protocol):
    """One kind of affine layer: its bilinear product ``*`` and the derivatives of it."""

    def run(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """``x * w + b``."""
        ...

    def run_both(self, x: Tensor, w: Tensor, y: Tensor, v: Tensor, b: Tensor | None) -> Tensor:
        """``x * w + y * v + b``, added up in place, so that it cannot be differentiated."""
        ...

    def pull(self, g: Tensor, x: Tensor, w: Tensor, wanted: Sequence[bool]) -> tuple:
        """Pull the output gradients g back to x, w and b.

        Args:
            g, x, w: the output gradients, the input and the weight.
            wanted: for each of x, w and b, whether its gradient is wanted.

        Returns:
            The gradients of x, w and b. Those that are not wanted are None.
        """
        ...

    def spread(self, b: Tensor, like: Tensor) -> Tensor:
        """The bias, expanded to the shape of an output ``like``."""
        ...


def affine(layer: Layer, x: Tensor, w: Tensor, b: Tensor | None, spared: Spared | None) -> Tensor:
    """Compute ``layer.run(x, w, b)`` with the derivatives of this file.

    Args:
        layer: the kind of layer.
        x, w, b: the input, the weight and the bias.
        spared: the parameters whose gradients may be left without values.
    """
    return _Affine.apply(x, w, b, layer, spared or ())  # pyright: ignore[reportReturnType]


class _Affine(Function):
    @staticmethod
    def forward(ctx, x, w, b, layer, spared):
        ctx.save_for_backward(x, w)
        ctx.layer, ctx.spared = layer, spared
        output = layer.run(x, w, b)
        # Autograd refuses in-place changes of a view that is made here, and torch's product of a
        # stack of matrices is one. It is a view of a temporary, which nobody else can change.
        is_view = output._base is not None
        return torch.ops.aten._unsafe_view(output, output.shape) if is_view else output

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        wanted = asked(ctx, 3)
        if not torch.is_grad_enabled():
            # Without a graph, another autograd function would only cost time.
            return *ctx.layer.pull(g, x, w, wanted), None, None
        spared = ctx.next_functions[1][0] in ctx.spared
        return *_Pull.apply(g, x, w, ctx.layer, wanted, spared), None, None  # pyright: ignore


class _Pull(Function):
    """The pull-back from output gradients to the wanted gradients of input, weight and bias."""

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
    """``v_x * w + x * v_w + v_b``, in which a cotangent that is None counts as zero."""
    if v_x is not None and v_w is not None:
        if torch.is_grad_enabled():
            return layer.run(v_x, w, v_b) + layer.run(x, v_w, None)
        return layer.run_both(v_x, w, x, v_w, v_b)
    if v_x is not None:
        return layer.run(v_x, w, v_b)
    if v_w is not None:
        return layer.run(x, v_w, v_b)
    return None if v_b is None else layer.spread(v_b, g)
