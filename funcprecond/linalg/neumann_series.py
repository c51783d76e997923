r"""The Neumann series :math:`B^{-1} = \eta \sum_j (I - \eta B)^j`, summed term by term.

It converges if and only if the eigenvalues of ``eta B`` are between 0 and 2; with a preconditioner
``M^-1`` those of ``eta M^-1 B``. A fixed number of terms is a fixed polynomial of B, so that the
result is linear in the right-hand side, as that of CG is not.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.solution import Matvec, Solution, Stop
from funcprecond.tracing import is_eager
from funcprecond.tree import Params

__all__ = ["neumann"]


def neumann(
    matvec: Matvec,
    b: Params,
    *,
    scale: float | Tensor = 1.0,
    precondition: Callable[[Params], Params] | None = None,
    tol: float | Tensor = 1e-5,
    max_iter: int = 250,
) -> Solution:
    """``B^-1 b`` by the Neumann series of ``scale B``.

    Args:
        matvec: ``v -> B v``.
        b: a dict of tensors.
        scale: ``eta``, below two over the largest eigenvalue.
        precondition: ``r -> M^-1 r``.
        tol: stop at ``|r| <= tol |b|``; 0 sums ``max_iter`` terms.
        max_iter: at most so many terms, one product each.

    Returns:
        A :class:`Solution`; DIVERGED where the residual has grown a million times over ``b``.
    """
    precondition = precondition or (lambda r: r)
    plain = is_eager((b, scale, tol))
    x, r = {k: torch.zeros_like(v) for k, v in b.items()}, b
    size = treemath.norm(b)
    finite, small = torch.isfinite(size), size == 0
    reason = torch.full_like(size, Stop.MAX_ITERATIONS.value, dtype=torch.int64)
    reason = torch.where(small, Stop.RESIDUAL.value, reason)
    reason = torch.where(finite, reason, Stop.NOT_FINITE.value)
    active, iterations = finite & ~small, torch.zeros_like(reason)
    for _ in range(max_iter):
        if plain and not bool(active):
            break
        step = treemath.mul(precondition(r), scale)
        new_r = treemath.sub(r, matvec(step))
        left = treemath.norm(new_r)
        finite = torch.isfinite(left)
        moves = active & finite
        x = {k: torch.where(moves, t + step[k], t) for k, t in x.items()}
        r = {k: torch.where(moves, new_r[k], t) for k, t in r.items()}
        iterations = iterations + moves.long()
        small, grown = left <= tol * size, left > 1e6 * size
        reason = torch.where(active & ~finite, Stop.NOT_FINITE.value, reason)
        reason = torch.where(moves & grown, Stop.DIVERGED.value, reason)
        reason = torch.where(moves & small, Stop.RESIDUAL.value, reason)
        active = moves & ~small & ~grown
    return Solution(x, r, iterations, reason)
