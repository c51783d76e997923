"""ReLU, whose second derivative is zero and is not computed.

torch 2.13 fills a tensor of the size of the input with zeros and adds it to other gradients. This
takes a tenth of a Hessian product of a small convolutional network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from funcprecond.tracing import is_traced

__all__ = ["relu"]


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute ``F.relu``, with torch's own derivatives if it is traced or in place."""
    if inplace or is_traced():
        return F.relu(input, inplace)
    return _Relu.apply(input)  # pyright: ignore[reportReturnType]


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
    """The pull-back, which keeps output gradients where the output is positive.

    It is its own pull-back.
    """

    @staticmethod
    def forward(ctx, g, y):
        ctx.save_for_backward(y)
        return torch.ops.aten.threshold_backward(g, y, 0)

    @staticmethod
    def backward(ctx, v):
        return _masked(v, *ctx.saved_tensors), None


def _masked(g, y):
    # Without a graph, another autograd function would only cost time.
    if torch.is_grad_enabled():
        return _Masked.apply(g, y)
    return torch.ops.aten.threshold_backward(g, y, 0)
