"""A linear layer of our own differentiation: see :mod:`funcprecond.autodiff.rules.affine`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.autodiff.rules.affine import affine
from funcprecond.autodiff.rules.backward import Spared
from funcprecond.tracing import is_traced

__all__ = ["linear"]


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, spared: Spared | None = None
) -> Tensor:
    """``F.linear`` of the same arguments, with the parameters whose gradients may have no value.

    Under a transform, a compiler, forward mode or autocast, and of complex numbers, it is torch's
    own.
    """
    plain = input.ndim > 1 and weight.ndim == 2 and input.dtype == weight.dtype
    if not plain or input.is_complex() or is_traced() or torch._C._is_any_autocast_enabled():
        return F.linear(input, weight, bias)
    return affine(_Linear(), input, weight, bias, spared)


class _Linear:
    """``x W^T + b``."""

    def run(self, x, w, b):
        return F.linear(x, w, b)

    def run_both(self, x, w, y, v, b):
        rows = F.linear(x.flatten(0, -2), w, b).addmm_(y.flatten(0, -2), v.mT)
        return rows.unflatten(0, x.shape[:-1])

    def pull(self, g, x, w, wanted):
        of_x, of_w, of_b = wanted
        rows = g.flatten(0, -2)
        return (
            g @ w if of_x else None,
            rows.mT @ x.flatten(0, -2) if of_w else None,
            rows.sum(0) if of_b else None,
        )

    def spread(self, b, like):
        return b.expand(like.shape)
