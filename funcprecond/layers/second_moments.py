"""Second moments of per-sample gradients in any bases of the inputs and outputs of a layer.

EKFAC and the exact diagonal of the Fisher matrix both use them. With the bases U and V of the
outputs and inputs of a layer, the second moments are ``Σ (U^T G_n V)²``, squared entry by entry and
summed over cotangents and examples. The gradient ``G_n = Σ_t g_nt a_nt^T`` of example n is summed
over its positions, and over all uses of a shared weight, before it is squared.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.layers.layer_call import LayerUse
from funcprecond.linalg.precision import factor_dtype

__all__ = ["joined", "second_moments"]

# The number of entries of per-sample gradients in memory at a time, if they must be formed.
CHUNK = 2**18


def second_moments(
    uses: Sequence[LayerUse], bias: bool, of_outputs: Tensor | None, of_inputs: Tensor | None
) -> Tensor:
    """Compute ``Σ (of_outputs^T G_n of_inputs)²``, summed over cotangents and examples.

    Args:
        uses: all uses of an affine layer whose input rows are not one-hot.
        bias: whether the bias is the last column of ``G_n``.
        of_outputs, of_inputs: orthonormal bases as columns, (o, r) and (i + 1, q), or (J, o / J, r)
            and (J, i + 1, q) for more than one group; None is the identity. Without a bias, i + 1
            is i.

    Returns:
        (r, q), or (J, r, q) for more than one group.
    """
    dtype = factor_dtype(uses[0].grads)
    # Each use of a shared weight adds positions.
    g = joined([use.call.grad_rows(use.grads, use.inputs).to(dtype) for use in uses], -2)
    a = joined([use.call.input_rows(use.inputs).to(dtype) for use in uses], -2)
    # With groups, the axes of cotangents and examples are between the group axis and the matrices.
    if a.ndim == 4:
        of_outputs = None if of_outputs is None else of_outputs[:, None, None]
        of_inputs = None if of_inputs is None else of_inputs.unsqueeze(1)

    def coordinates(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        g = g if of_outputs is None else g @ of_outputs
        if bias and a.ndim == 3 and of_inputs is not None:
            # This avoids the copy that would append the 1 of the bias to the rows.
            return F.linear(a, of_inputs[:-1].mT, of_inputs[-1]), g
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1) if bias else a
        return a if of_inputs is None else a @ of_inputs, g

    def squares(a: Tensor, g: Tensor) -> Tensor:
        a, g = coordinates(a, g)
        if a.shape[-2] == 1:
            return g.squeeze(-2).square().sum(-3).mT @ a.squeeze(-2).square()
        return (g.mT @ a.unsqueeze(-4)).square_().sum((-4, -3))

    # If each example has a single position, then no gradient is formed and no parts are needed.
    step = max(1, CHUNK // ((a.shape[-1] + bias) * g.shape[-1] * g.shape[-4]))
    step = a.shape[-3] if a.shape[-2] == 1 else step
    parts = zip(a.split(step, -3), g.split(step, -3), strict=True)
    return functools.reduce(torch.add, (squares(*part) for part in parts))


def joined(parts: list[Tensor], axis: int) -> Tensor:
    """Concatenate the parts along an axis; a single part is returned without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
