r"""The Neumann series :math:`B^{-1} = \eta \sum_j (I - \eta B)^j`, summed term by term.

It converges if and only if the eigenvalues of ``eta B`` lie between 0 and 2; with a preconditioner,
those of ``eta M^-1 B``. A fixed number of terms is a fixed polynomial of B, so that the result is
linear in the right-hand side, unlike the result of CG.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.solution import Matvec, Solution, Stop
from funcprecond.linalg.true_residuals import unit, verified
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
    """``B^-1 b`` by the Neumann series of ``scale B``, or of ``scale M^-1 B`` if preconditioned.

    Args:
        matvec: the product ``v -> B v``.
        b: the right-hand side, a dict of tensors.
        scale: a positive number below ``2 / lambda_max``, where lambda_max is the largest
            eigenvalue of B, or of ``M^-1 B``.
        precondition: the product ``r -> M^-1 r``.
        tol: stop at ``|r| <= tol |b|``, where r is the residual; 0 sums ``max_iter`` terms.
        max_iter: the maximum number of terms.

    Returns:
        A :class:`Solution`. Its reason is DIVERGED if the norm of the residual has exceeded a
        million times that of ``b``, and STALLED where rounding errors keep the true residual above
        the tolerance. Costs one product per term, and one that computes the residual in the end.

    Example:
        >>> import torch, funcprecond as fp
        >>> half = lambda v: {"x": 0.5 * v["x"]}
        >>> fp.linalg.neumann(half, {"x": torch.ones(2)}, tol=0.0, max_iter=3).solution
        {'x': tensor([1.7500, 1.7500])}
    """
    precondition = precondition or (lambda r: r)
    plain, one = is_eager((b, scale, tol)), unit(b)
    b = treemath.mul(b, 1 / one)
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
    r, reason = verified(matvec, b, x, r, reason, tol * size, plain=plain)
    return Solution(treemath.mul(x, one), treemath.mul(r, one), iterations, reason)
