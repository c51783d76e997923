"""Second moments of per-example gradients along the axes of any basis of a layer.

The one piece of mathematics that EKFAC and the exact diagonal share: with U and V the bases of a
layer's outputs and inputs, ``Σ (U^T G_n V)²`` entry by entry, where ``G_n = Σ_t g_nt a_nt^T`` is
summed over an example's positions, and over all uses of a shared weight, before it is squared.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.curvature.layer_statistics import LayerUse
from funcprecond.linalg.precision import factor_dtype

__all__ = ["second_moments", "unit_moments"]

# Entries of per-example gradients in memory at a time, where positions must be summed first.
CHUNK = 2**18


def second_moments(
    uses: Sequence[LayerUse],
    bias: bool,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """``Σ (left^T G_n right)²`` over cotangents and examples.

    Args:
        uses: all uses of an affine layer or an embedding.
        bias: whether the bias is a last column of G.
        left: eigenvectors of the weight's axis 0 as columns, (o, o), or (J, o / J, o / J) for a
            convolution's groups; None is the identity, as it always is for an embedding.
        right: likewise of the remaining axes.

    Returns:
        (o, i + 1), or (J, o / J, i + 1) for more than one group.
    """
    call = uses[0].call
    dtype = factor_dtype(uses[0].grads)
    # The uses of a shared weight are further positions.
    g = _join([use.grad_rows().to(dtype) for use in uses], -2)
    if call.kind == "embedding":
        return _embedding_moments(uses, g, right)
    a = _join([use.input_rows().to(dtype) for use in uses], -2)
    swap = call.kind == "conv_transpose" or call.options == ("in_out",)
    first, second = (right, left) if swap else (left, right)
    if call.kind.startswith("conv") and a.shape[0] == 1:
        a, g = a.squeeze(0), g.squeeze(0)
    # A convolution's groups lead; (..., n, t, i) and (..., v, n, t, o).
    if a.ndim == 4:
        first = None if first is None else first[:, None, None]
        second = None if second is None else second.unsqueeze(1)

    def coordinates(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        g = g if first is None else g @ first
        if bias and a.ndim == 3 and second is not None:
            # The input 1 that belongs to the bias is not appended to the rows.
            return F.linear(a, second[:-1].mT, second[-1]), g
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1) if bias else a
        return a if second is None else a @ second, g

    def squares(a: Tensor, g: Tensor) -> Tensor:
        a, g = coordinates(a, g)
        if a.shape[-2] == 1:
            return g.squeeze(-2).square().sum(-3).mT @ a.squeeze(-2).square()
        return (g.mT @ a.unsqueeze(-4)).square_().sum((-4, -3))

    # Of examples with a single position no gradient is formed.
    step = max(1, CHUNK // ((a.shape[-1] + bias) * g.shape[-1] * g.shape[-4]))
    step = a.shape[-3] if a.shape[-2] == 1 else step
    parts = zip(a.split(step, -3), g.split(step, -3), strict=True)
    moments = functools.reduce(torch.add, (squares(*part) for part in parts))
    return moments.mT if swap else moments


def unit_moments(uses: Sequence[LayerUse], bias: bool) -> Tensor:
    """(U, 1 or 2): the same for the scale, and the bias, of each unit of a norm layer."""
    g = _join([use.grad_rows().to(factor_dtype(use.grads)) for use in uses], -2)
    x = _join([use.input_rows() for use in uses], -2)
    gradients = [(g * x).sum(-2)] + ([g.sum(-2)] if bias else [])
    return torch.stack(gradients, -1).square().sum((0, 1))


def _embedding_moments(uses: Sequence[LayerUse], g: Tensor, right: Tensor | None) -> Tensor:
    """Rows of one token add up within an example before they are squared."""
    padding, vocabulary = uses[0].call.options
    ids = _join([use.input_rows() for use in uses], -1)
    if right is not None:
        g = g @ right
    if padding is not None:
        g = g * (ids != padding).unsqueeze(-1)
    same = (ids.unsqueeze(-1) == ids.unsqueeze(-2)).to(g.dtype)
    squares = ((same @ g) * g).sum(0)
    return g.new_zeros(vocabulary, g.shape[-1]).index_add(0, ids.reshape(-1), squares.flatten(0, 1))


def _join(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
