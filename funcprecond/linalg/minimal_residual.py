"""MINRES: the least residual over a Krylov space, for any symmetric matrix.

The method combines Lanczos' recursion with Givens rotations (Paige & Saunders 1975). The norm of
the residual, :math:`|b - B x|`, decreases in every iteration, even if the matrix is indefinite or
singular. If a singular system has solutions, the method finds the one of least norm. With a
preconditioner, Lanczos' recursion uses the inner product of :math:`M^{-1}`, and it is
:math:`(r^T M^{-1} r)^{1/2}` that decreases in every iteration.
"""

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.linalg import treemath
from funcprecond.linalg.solution import Matvec, Solution, Stop
from funcprecond.linalg.true_residuals import AGAIN, Best, settle, unit
from funcprecond.tracing import is_eager
from funcprecond.tree import Params, state

__all__ = ["minres"]

# The true residual is computed once in INTERVAL iterations, and at the early ones where its errors
# are estimated to exceed DOUBT times the residual.
EARLY = (8, 11, 14, 18, 24, 31, 40)
INTERVAL = 50
DOUBT = 0.01
# After a pass that leads to x, the recursion's residual differs from the true one by up to about
# this many times eps |B| |x|, as measured at condition numbers from 1 to 1e8.
ERRORS = 32


def minres(
    matvec: Matvec,
    b: Params,
    x0: Params | None = None,
    *,
    precondition: Matvec | None = None,
    tol: float | Tensor = 1e-5,
    max_iter: int = 250,
) -> Solution:
    """Minimize ``|b - B x|`` for a symmetric matrix B by MINRES (Paige & Saunders 1975).

    The method keeps nine vectors in memory. Under a transform or a
    compiler, all ``max_iter`` iterations run, and a finished problem does not change any more.

    Args:
        matvec: the product ``v -> B v``.
        b: the right-hand side, a dict of tensors that is not empty.
        x0: the first iterate, zero by default. It costs one product.
        precondition: the product ``r -> M^-1 r``. M must be symmetric positive definite, even if B
            is not. If ``r^T M^-1 r`` is negative, the iteration stops with NOT_POSITIVE.
        tol: stop with RESIDUAL at ``|b - B x| <= tol |b|``. When the recursion's residual is that
            small, or as small as its rounding errors, the true one is computed by a product. If it
            is too large, the method starts again from this iterate. It stops with STALLED if this
            does not halve the residual, and if ``|B r|`` is as small as rounding errors relative to
            ``|B| |r|``, in the norms of the preconditioner: the result is then the least-squares
            solution of a system without a solution.
        max_iter: the maximum number of iterations.

    Returns:
        A :class:`Solution`, whose residual is ``b - B x`` as a product gives it. Costs one product
        per iteration, one in 50 iterations, and one at the end; a few more if rounding errors
        matter.

    Example:
        >>> import torch, funcprecond as fp
        >>> indefinite = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> b = {"x": torch.tensor([2.0, 3.0])}
        >>> found = fp.linalg.minres(lambda v: {"x": indefinite @ v["x"]}, b)
        >>> torch.allclose(found.solution["x"], torch.tensor([3.0, 2.0]))
        True
    """
    plain, one = is_eager((b, x0)), unit(b)
    b = treemath.mul(b, 1 / one)
    zero = {k: torch.zeros_like(v) for k, v in b.items()}
    # The iterate is base + x, where x belongs to the present pass.
    base, x = zero if x0 is None else treemath.mul(x0, 1 / one), zero
    r = b if x0 is None else treemath.sub(b, matvec(base))
    size, limit = treemath.norm(r), tol * treemath.norm(b)
    s, broken = _begin(r, precondition)
    small, finite = size <= limit, torch.isfinite(s.phibar) & torch.isfinite(limit)
    reason = torch.full_like(size, Stop.MAX_ITERATIONS.value, dtype=torch.int64)
    reason = torch.where(broken, Stop.NOT_POSITIVE.value, reason)
    reason = torch.where(small, Stop.RESIDUAL.value, reason)
    reason = torch.where(finite, reason, Stop.NOT_FINITE.value)
    active, claims = finite & ~small & ~broken, torch.zeros_like(finite)
    iterations, norm = torch.zeros_like(reason), torch.zeros_like(size)
    length, extent, errors, goal = size, torch.zeros_like(size), torch.zeros_like(size), limit
    # With a preconditioner, the Euclidean norm of the residual may rise on the way.
    best = Best(base, r, size if precondition is None else torch.full_like(size, torch.inf))
    begun, earlier = best.size, None
    # This is not tol, because B r is also small relative to r if the matrix is ill-conditioned.
    rounding = torch.finfo(size.dtype).eps ** (2 / 3)
    coarse = max(torch.finfo(v.dtype).eps for v in b.values())

    for i in range(max_iter):
        # An eager call checks a claim at once, and early iterates that are in doubt. Traced code
        # cannot branch: it checks at intervals.
        due = i > 0 and i % INTERVAL == 0
        if plain and i in EARLY and not due:
            due = bool((active & ~(errors <= DOUBT * length)) | claims)
            earlier = earlier if due else treemath.add(base, x)
        if due or (plain and not bool(active)):
            if plain and not bool(active | claims):
                break
            last = best.size
            options = {"claims": claims, "among": active | claims, "limit": limit, "begun": begun}
            found = treemath.add(base, x)
            best, size, again, reason = settle(matvec, b, found, best, reason=reason, **options)
            if plain and earlier is not None and bool(size > 2 * length):
                # The recursion went wrong after the last early iterate, perhaps.
                best, _, again, reason = settle(matvec, b, earlier, best, reason=reason, **options)
            earlier = None
            active = active & (best.size > limit)
            again = again | (active & ~(size <= 2 * length) & (best.size < last))
            fresh, broken = _begin(best.residual, precondition)
            again = again & ~broken
            s = tree.map(lambda new, old, a=again: torch.where(a, new, old), fresh, s)
            base, x = treemath.where(again, best.x, base), treemath.where(again, zero, x)
            length = torch.where(again, best.size, length)
            goal = torch.where(again, AGAIN * limit, goal)
            extent, errors = torch.where(again, 0.0, extent), torch.where(again, 0.0, errors)
            begun = torch.where(again, best.size, begun)
            active, claims = active | again, torch.zeros_like(claims)
            if plain and not bool(active):
                break
        v = treemath.mul(s.z, 1 / _nonzero(s.beta))
        product = matvec(v)
        y = treemath.add(product, s.r1, -s.beta / _nonzero(s.old_beta))
        alpha = treemath.dot(v, y)
        y = treemath.add(y, s.r2, -alpha / _nonzero(s.beta))
        z, broken = y, torch.zeros_like(finite)
        if precondition is None:
            beta = treemath.norm(y)
        else:
            z = precondition(y)
            beta, broken = _root(treemath.dot(y, z))
        # Apply the last rotation to the next column of T, then find the one that eliminates beta.
        delta = s.cosine * s.dbar + s.sine * alpha
        gbar = s.sine * s.dbar - s.cosine * alpha
        dbar = -s.cosine * beta
        norm = torch.maximum(norm, torch.hypot(alpha, beta))
        gamma = _nonzero(torch.hypot(gbar, beta))
        cosine, sine = gbar / gamma, beta / gamma
        phibar = s.phibar * sine
        w = treemath.add(treemath.add(v, s.w2, -s.epsilon), s.w, -delta)
        w = treemath.mul(w, 1 / gamma)
        new_x = treemath.add(x, w, cosine * s.phibar)
        new_length, residual, largest = phibar, s.residual, norm
        if precondition is not None:
            # phibar is the residual's norm in M^-1; its Euclidean norm requires the vector.
            residual = treemath.mul(residual, sine**2)
            residual = treemath.add(residual, y, -cosine * phibar / _nonzero(beta))
            new_length = treemath.norm(residual)
            largest = treemath.norm(product) / _nonzero(treemath.norm(v))
        new_extent = treemath.norm(new_x)
        new_errors = ERRORS * coarse * largest * new_extent
        finite = torch.isfinite(alpha) & torch.isfinite(beta) & torch.isfinite(phibar)
        # Once |B r| vanishes relative to |B| |r|, which takes a singular system, the residual
        # cannot become smaller. Where rounding hides this, x grows and the residual does not
        # change. A pass ends where its rounding errors are as large as the residual.
        flat = torch.hypot(gbar, dbar) <= rounding * norm
        runs_away = (cosine**2 <= rounding) & (new_extent > 10 * extent) & (extent > 0)
        ends = active & finite & ~broken & (flat | runs_away | ~(new_errors < length))
        moves = active & finite & ~broken & ~ends
        x, iterations = treemath.where(moves, new_x, x), iterations + moves.long()
        length = torch.where(moves, new_length, length)
        extent = torch.where(moves, new_extent, extent)
        errors = torch.where(moves, new_errors, errors)
        reason = torch.where(active & ~finite, Stop.NOT_FINITE.value, reason)
        reason = torch.where(active & finite & broken, Stop.NOT_POSITIVE.value, reason)
        small = (new_length <= goal) | (new_length <= new_errors)
        claims, active = claims | ends | (moves & small), moves & ~small
        rotation = (phibar, dbar, s.sine * beta, cosine, sine)
        # A problem that waits goes on here, and starts again from its best iterate or not at all.
        s = _Lanczos(s.r2, y, z, w, s.w, residual, beta, s.beta, *rotation)
    else:
        options = {
            "claims": claims,
            "among": torch.ones_like(claims),
            "limit": limit,
            "begun": begun,
        }
        best, _, _, reason = settle(
            matvec, b, treemath.add(base, x), best, reason=reason, **options
        )
    x, r = treemath.mul(best.x, one), treemath.mul(best.residual, one)
    return Solution(x, r, iterations, reason)


@state
class _Lanczos:
    """The state of Lanczos' recursion and of the rotations, in the letters of the paper.

    Attributes:
        r1, r2, z: the last two vectors of the recursion, and ``M^-1 r2``.
        w, w2: the last two search directions.
        residual: ``b - B x`` by a recursion, with a preconditioner only.
        beta, old_beta: the last two off-diagonal entries of T.
        phibar: the norm of the residual, in ``M^-1``.
        dbar, epsilon, cosine, sine: of the last rotation.
    """

    r1: Params
    r2: Params
    z: Params
    w: Params
    w2: Params
    residual: Params
    beta: Tensor
    old_beta: Tensor
    phibar: Tensor
    dbar: Tensor
    epsilon: Tensor
    cosine: Tensor
    sine: Tensor


def _begin(r: Params, precondition: Matvec | None) -> tuple[_Lanczos, Tensor]:
    """The state at a first residual, and whether the preconditioner is not positive there."""
    if precondition is None:
        z, beta = r, treemath.norm(r)
        broken = torch.zeros_like(beta, dtype=torch.bool)
    else:
        z = precondition(r)
        beta, broken = _root(treemath.dot(r, z))
    none, zero = {k: torch.zeros_like(v) for k, v in r.items()}, torch.zeros_like(beta)
    rotation = (beta, zero, zero, -torch.ones_like(beta), zero)
    return _Lanczos(none, r, z, none, none, r, beta, zero, *rotation), broken


def _root(square: Tensor) -> tuple[Tensor, Tensor]:
    """The root of a squared norm, and whether the argument is negative, so that it is not one."""
    return square.clamp_min(0).sqrt(), square < 0


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)
