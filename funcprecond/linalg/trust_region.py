"""Conjugate gradients within a trust region, for any symmetric matrix."""

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.solution import Matvec, Solution, Stop
from funcprecond.linalg.true_residuals import unit, verified
from funcprecond.tracing import is_eager
from funcprecond.tree import Params

__all__ = ["truncated_cg"]


def truncated_cg(
    matvec: Matvec,
    b: Params,
    *,
    radius: float | Tensor,
    tol: float | Tensor | None = None,
    max_iter: int = 250,
) -> Solution:
    """Minimize ``x^T B x / 2 - b^T x`` within ``|x| <= radius`` by Steihaug's truncated CG (1983).

    B can be any symmetric matrix. Along a search direction of negative curvature, and where an
    iterate would leave the region, the solution is the point at which the search direction meets
    the boundary. The value of the model is never above its minimum along ``b`` within the region.

    Args:
        matvec: the product ``v -> B v``.
        b: the right-hand side, a dict of tensors.
        radius: the radius of the trust region, positive.
        tol: stop at ``|b - B x| <= tol |b|``; by default ``min(0.5, |b|^(1/2))``, with which
            Newton's method converges superlinearly.
        max_iter: the maximum number of products.

    Returns:
        A :class:`Solution` whose reason is RESIDUAL, BOUNDARY, MAX_ITERATIONS, NOT_FINITE, or
        STALLED where rounding errors keep the true residual above the tolerance. Costs one product
        per iteration, and one that computes the residual inside of the region.

    Example:
        >>> import torch, funcprecond as fp
        >>> b = {"x": torch.tensor([3.0, 4.0])}
        >>> found = fp.linalg.truncated_cg(lambda v: v, b, radius=1.0)
        >>> torch.allclose(found.solution["x"], torch.tensor([0.6, 0.8]))
        True
        >>> fp.Stop(int(found.reason)).name
        'BOUNDARY'
    """
    plain, one = is_eager((b, radius, tol)), unit(b)
    tol = treemath.norm(b).sqrt().clamp_max(0.5) if tol is None else tol
    b, radius = treemath.mul(b, 1 / one), radius / one
    x, r, p = {k: torch.zeros_like(v) for k, v in b.items()}, b, b
    rr = treemath.dot(r, r)
    size = rr.sqrt()
    limit = tol * size
    finite = torch.isfinite(rr)
    small = finite & (size <= limit)
    reason = torch.full_like(rr, Stop.MAX_ITERATIONS.value, dtype=torch.int64)
    reason = torch.where(finite, reason, Stop.NOT_FINITE.value)
    reason = torch.where(small, Stop.RESIDUAL.value, reason)
    active, iterations = finite & ~small, torch.zeros_like(reason)
    for _ in range(max_iter):
        if plain and not bool(active):
            break
        product = matvec(p)
        curvature = treemath.dot(p, product)
        alpha = rr / torch.where(curvature > 0, curvature, 1)
        xx, xp, pp = treemath.dot(x, x), treemath.dot(x, p), treemath.dot(p, p)
        leaves = (curvature <= 0) | (xx + 2 * alpha * xp + alpha**2 * pp >= radius**2)
        # The positive solution tau of |x + tau p| = radius, in the form without cancellation.
        gap = (radius**2 - xx).clamp_min(0)
        tau = gap / (xp + (xp**2 + pp * gap).sqrt()).clamp_min(torch.finfo(rr.dtype).tiny)
        step = torch.where(leaves, tau, alpha)
        new_x, new_r = treemath.add(x, p, step), treemath.add(r, product, -step)
        new_rr = treemath.dot(new_r, new_r)
        finite = torch.isfinite(curvature) & torch.isfinite(new_rr)
        moves = active & finite
        x, r = treemath.where(moves, new_x, x), treemath.where(moves, new_r, r)
        iterations = iterations + moves.long()
        small = new_rr.sqrt() <= limit
        reason = torch.where(moves & small, Stop.RESIDUAL.value, reason)
        reason = torch.where(moves & leaves, Stop.BOUNDARY.value, reason)
        reason = torch.where(active & ~finite, Stop.NOT_FINITE.value, reason)
        active = moves & ~small & ~leaves
        p = treemath.add(new_r, p, new_rr / torch.where(rr == 0, 1, rr))
        rr = new_rr
    r, reason = verified(matvec, b, x, r, reason, limit, plain=plain)
    return Solution(treemath.mul(x, one), treemath.mul(r, one), iterations, reason)
