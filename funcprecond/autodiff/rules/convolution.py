"""Convolutions with the derivatives of :mod:`funcprecond.autodiff.rules.affine`.

A convolution, its transpose in the input and its transpose in the kernel are bilinear, and each is
a derivative of the others.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcprecond.autodiff.rules.affine import affine
from funcprecond.autodiff.rules.backward import Spared
from funcprecond.tracing import is_traced

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
    """Compute a convolution.

    Torch's own derivatives are used under a transform, a compiler or forward mode, for a padding
    that is a string, and for an input without a batch axis.

    Args:
        function: one of ``F.conv1d``, ``F.conv2d`` and ``F.conv3d``.
        input, weight, bias, stride, padding, dilation, groups: the arguments of ``function``.
        spared: the parameters whose gradients may be left without values.

    Returns:
        The output of the convolution.
    """
    if is_traced() or input.ndim != weight.ndim or isinstance(padding, str):
        return function(input, weight, bias, stride, padding, dilation, groups)
    dims = weight.ndim - 2
    per_axis = [
        (o,) * dims if isinstance(o, int) else tuple(o) for o in (stride, padding, dilation)
    ]
    layer = _Convolution((*per_axis, False, (0,) * dims, groups))
    return affine(layer, input, weight, bias, spared)


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """The convolution ``x * w + b``.

    Attributes:
        geometry: the arguments of ``torch.convolution`` from the stride on.
    """

    geometry: tuple

    def run(self, x, w, b):
        return torch.convolution(x, w, b, *self.geometry)

    def run_both(self, x, w, y, v, b):
        return self.run(x, w, b).add_(self.run(y, v, None))

    def pull(self, g, x, w, wanted):
        of_x, of_w, of_b = wanted
        for_x, for_w, _ = torch.ops.aten.convolution_backward(
            g, x, w, None, *self.geometry, [of_x, of_w, False]
        )
        return for_x, for_w, g.sum((0, *range(2, g.ndim))) if of_b else None

    def spread(self, b, like):
        return b.reshape(-1, *[1] * (like.ndim - 2)).expand(like.shape)
