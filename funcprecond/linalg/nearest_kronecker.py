"""The Kronecker product nearest to a sum of Kronecker products, from small matrices alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["nearest_kronecker"]


def nearest_kronecker(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Minimize ``|Σ_i left_i ⊗ right_i - left ⊗ right|`` in the Frobenius norm over left and right.

    Rearranged, the sum is the matrix ``Σ_i vec(left_i) vec(right_i)ᵀ``, of rank at most k for k
    terms, and its first singular pair is the solution (Van Loan & Pitsianis, 1993). Both singular
    vectors are combinations of the terms, so that only (k, k) matrices are decomposed. If the terms
    are positive semi-definite, the combinations have no negative weights. Left and right have equal
    norms.

    Args:
        lefts, rights: k tensors each, of equal shapes: matrices, or their diagonals.

    Returns:
        (left, right), shaped like the terms; NaN if a term is not finite.
    """
    (x, gx), (y, gy) = _rooted(lefts), _rooted(rights)
    core = gx.mT @ gy
    finite = torch.isfinite(core).all()
    u, values, vh = torch.linalg.svd(torch.where(finite, core, 0.0))
    share = torch.where(values[0] > 0, values[0], 1).rsqrt()
    left, right = (gy @ vh[0]) * share, (gx @ u[:, 0]) * share
    sign = torch.where(left.sum() < 0, -1.0, 1.0).to(left.dtype)
    scale = torch.where(finite, sign, torch.nan)
    return torch.tensordot(scale * left, x, 1), torch.tensordot(scale * right, y, 1)


def _rooted(terms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The terms as one stack, and a root R of their Gram matrix ``R Rᵀ``."""
    stack = torch.stack(list(terms))
    rows = stack.flatten(1)
    gram = rows @ rows.mT
    finite = torch.isfinite(gram).all()
    values, vectors = torch.linalg.eigh(torch.where(finite, gram, 0.0))
    return stack, torch.where(finite, vectors * values.clamp_min(0).sqrt(), torch.nan)
