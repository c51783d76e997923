"""Checks of an iterative solver's claim to have solved a system, by a product of its own.

A solver follows the residual ``b - B x`` by a recursion, which costs no product. Rounding errors
separate the two, and with an ill-conditioned matrix the recursion's residual falls to zero while
the true one does not. A solver therefore only *claims* that its residual is small, and reports
RESIDUAL after the true residual has been computed and is small.
"""

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.precision import factor_dtype
from funcprecond.linalg.solution import Matvec, Stop
from funcprecond.tree import Params, state

__all__ = ["AGAIN", "Best", "settle", "unit", "verified"]

# A solver starts again from the checked iterate if the last pass divided the true residual by 2.
PROGRESS = 0.5
# It then goes on until the recursion's residual is this part of the limit, for a margin.
AGAIN = 0.25


@state
class Best:
    """The iterate with the smallest residual of those that have been checked.

    Attributes:
        x: the iterate.
        residual: ``b - B x``, computed by a product.
        size: its norm, a 0-d tensor; infinite before the first check.
    """

    x: Params
    residual: Params
    size: Tensor


def unit(b: Params) -> Tensor:
    """The power of two next to the largest entry of ``b``, a 0-d tensor; 1 if there is none.

    Solvers divide the system by it, which is exact, so that squares of a tiny or huge right-hand
    side neither underflow nor overflow.
    """
    entries = [v.abs().amax().to(factor_dtype(v)) for v in b.values() if v.numel()]
    if not entries:
        return treemath.scalar_like(b, 1.0)
    largest = torch.stack(entries).amax()
    usable = (largest > 0) & torch.isfinite(largest)
    power = torch.where(usable, largest, 1.0).log2().floor().exp2()
    # The reciprocal must be a normal number too.
    tiny = max(torch.finfo(v.dtype).tiny for v in b.values())
    return power.clamp(tiny, 1 / tiny)


def settle(
    matvec: Matvec,
    b: Params,
    x: Params,
    best: Best,
    *,
    begun: Tensor,
    claims: Tensor,
    among: Tensor,
    limit: Tensor,
    reason: Tensor,
) -> tuple[Best, Tensor, Tensor, Tensor]:
    """Compute the true residual of an iterate, and decide about a claim that it is small.

    Args:
        matvec, b, x: the system and the iterate.
        best: the best of the iterates that were checked before.
        begun: the norm of the residual at which the solver's pass began.
        claims: a 0-d boolean, whether the solver claims that ``x`` solves the system.
        among: a 0-d boolean, whether ``x`` is compared with ``best``. It is true wherever
            ``claims`` is.
        limit: the norm of the residual that was asked for.
        reason: the :class:`Stop` value.

    Returns:
        The best iterate now; the norm of the residual of ``x``; a 0-d boolean, whether a solver
        whose claim failed should start again from the best iterate, because the last pass has
        divided the true residual by two or more; and the reason: RESIDUAL where the best residual
        is at most ``limit``, and STALLED where a claim failed and there is no progress. Costs one
        product.
    """
    residual = treemath.sub(b, matvec(x))
    size = treemath.norm(residual)
    better, again = among & (size < best.size), claims & (size < PROGRESS * begun)
    best = Best(
        treemath.where(better, x, best.x),
        treemath.where(better, residual, best.residual),
        torch.where(better, size, best.size),
    )
    solved = among & (best.size <= limit)
    again = again & ~solved
    failed = torch.where(again, Stop.MAX_ITERATIONS.value, Stop.STALLED.value)
    reason = torch.where(claims, failed, reason)
    return best, size, again, torch.where(solved, Stop.RESIDUAL.value, reason)


def verified(
    matvec: Matvec, b: Params, x: Params, r: Params, reason: Tensor, limit: Tensor, *, plain: bool
) -> tuple[Params, Tensor]:
    """The residual and the reason of a solver that makes one pass only.

    Args:
        matvec, b, x: the system and the last iterate.
        r: the recursion's residual.
        reason: the :class:`Stop` value; RESIDUAL stands for a claim here.
        limit: the norm of the residual that was asked for.
        plain: whether the call is eager, so that nothing is computed where nothing is claimed.

    Returns:
        The true residual and RESIDUAL, or STALLED if it is larger than ``limit``; ``r`` and the
        reason as they are if nothing is claimed. Costs one product.
    """
    claims = reason == Stop.RESIDUAL.value
    if plain and not bool(claims):
        return r, reason
    residual = treemath.sub(b, matvec(x))
    fails = claims & ~(treemath.norm(residual) <= limit)
    return treemath.where(claims, residual, r), torch.where(fails, Stop.STALLED.value, reason)
