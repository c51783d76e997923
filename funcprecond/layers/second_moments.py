"""Second moments of per-sample gradients along the axes of any basis of a layer.

EKFAC and the exact diagonal share this piece of mathematics: with U and V the bases of a layer's
outputs and inputs it is ``Σ (U^T G_n V)²`` entry by entry, where ``G_n = Σ_t g_nt a_nt^T`` is
summed over an example's positions, and over all uses of a shared weight, before it is squared.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.layers.layer_call import LayerUse
from funcprecond.linalg.precision import factor_dtype

__all__ = ["joined", "second_moments"]

# Entries of per-sample gradients in memory at a time, where positions must be summed first.
CHUNK = 2**18


def second_moments(
    uses: Sequence[LayerUse], bias: bool, of_outputs: Tensor | None, of_inputs: Tensor | None
) -> Tensor:
    """``Σ (of_outputs^T G_n of_inputs)²`` over cotangents and examples.

    Args:
        uses: all uses of an affine layer; their rows are not one-hot.
        bias: whether the bias is a last column of ``G_n``.
        of_outputs, of_inputs: orthonormal bases as columns, (o, r) and (i + 1, q), or (J, o / J, r)
            and (J, i + 1, q) for more than one group; None is the identity.

    Returns:
        (r, q), or (J, r, q).
    """
    dtype = factor_dtype(uses[0].grads)
    # The uses of a shared weight are further positions.
    g = joined([use.call.grad_rows(use.grads, use.inputs).to(dtype) for use in uses], -2)
    a = joined([use.call.input_rows(use.inputs).to(dtype) for use in uses], -2)
    # With groups, the axes of examples and cotangents stand between theirs and the matrix's.
    if a.ndim == 4:
        of_outputs = None if of_outputs is None else of_outputs[:, None, None]
        of_inputs = None if of_inputs is None else of_inputs.unsqueeze(1)

    def coordinates(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        g = g if of_outputs is None else g @ of_outputs
        if bias and a.ndim == 3 and of_inputs is not None:
            # The input 1 that belongs to the bias is not appended to the rows.
            return F.linear(a, of_inputs[:-1].mT, of_inputs[-1]), g
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1) if bias else a
        return a if of_inputs is None else a @ of_inputs, g

    def squares(a: Tensor, g: Tensor) -> Tensor:
        a, g = coordinates(a, g)
        if a.shape[-2] == 1:
            return g.squeeze(-2).square().sum(-3).mT @ a.squeeze(-2).square()
        return (g.mT @ a.unsqueeze(-4)).square_().sum((-4, -3))

    # Of examples with a single position no gradient is formed.
    step = max(1, CHUNK // ((a.shape[-1] + bias) * g.shape[-1] * g.shape[-4]))
    step = a.shape[-3] if a.shape[-2] == 1 else step
    parts = zip(a.split(step, -3), g.split(step, -3), strict=True)
    return functools.reduce(torch.add, (squares(*part) for part in parts))


def joined(parts: list[Tensor], axis: int) -> Tensor:
    """The parts one after another along an axis; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
