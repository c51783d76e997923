"""The Kronecker product nearest to a sum of Kronecker products, by small matrices alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["nearest_kronecker"]


def nearest_kronecker(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Left and right with ``|Σ_i left_i ⊗ right_i - left ⊗ right|`` (Frobenius) least.

    Rearranged, the sum is ``Σ_i vec(left_i) vec(right_i)ᵀ``, of rank k for k terms, and its first
    singular pair is the answer (Van Loan & Pitsianis, 1993). Both of its vectors are combinations
    of the terms, so that only two (k, k) Gram matrices are decomposed. Of positive semi-definite
    terms the combinations have no negative weight. The two parts share the norm equally.

    Args:
        lefts, rights: k tensors each, alike in shape: matrices, or their diagonals.
    """
    (x, gx), (y, gy) = _rooted(lefts), _rooted(rights)
    u, values, vh = torch.linalg.svd(gx.mT @ gy)
    share = torch.where(values[0] > 0, values[0], 1).rsqrt()
    left, right = (gy @ vh[0]) * share, (gx @ u[:, 0]) * share
    sign = torch.where(left.sum() < 0, -1.0, 1.0).to(left.dtype)
    return torch.tensordot(sign * left, x, 1), torch.tensordot(sign * right, y, 1)


def _rooted(terms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The terms as one stack, and a root ``R Rᵀ`` of their Gram matrix."""
    stack = torch.stack(list(terms))
    rows = stack.flatten(1)
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    return stack, vectors * values.clamp_min(0).sqrt()
