"""Linear layers with the derivatives of :mod:`funcprecond.autodiff.rules.affine`."""

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
    """Compute ``F.linear``.

    Torch's own derivatives are used under a transform, a compiler, forward mode or autocast, and
    for complex numbers, inputs with one axis and mixed dtypes.

    Args:
        input, weight, bias: the arguments of ``F.linear``.
        spared: the parameters whose gradients may be left without values.

    Returns:
        The output of the layer.
    """
    plain = input.ndim > 1 and weight.ndim == 2 and input.dtype == weight.dtype
    if not plain or input.is_complex() or is_traced() or torch._C._is_any_autocast_enabled():
        return F.linear(input, weight, bias)
    return affine(_Linear(), input, weight, bias, spared)


class _Linear:
    """The layer ``x W^T + b``."""

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
