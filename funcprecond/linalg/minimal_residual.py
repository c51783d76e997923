r"""MINRES: the least residual over a Krylov space, for any symmetric matrix.

Lanczos and Givens rotations (Paige & Saunders 1975). The residual :math:`|b - B x|` falls in every
iteration, also where the matrix is indefinite or singular; a singular system that has a solution
gets its shortest one. With a preconditioner, Lanczos runs in the inner product of
:math:`M^{-1}`, and it is :math:`(r^T M^{-1} r)^{1/2}` that falls in every iteration.
"""

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.solution import Matvec, Solution, Stop
from funcprecond.tracing import is_eager
from funcprecond.tree import Params

__all__ = ["minres"]


def minres(
    matvec: Matvec,
    b: Params,
    x0: Params | None = None,
    *,
    precondition: Matvec | None = None,
    tol: float | Tensor = 1e-5,
    max_iter: int = 250,
) -> Solution:
    """Minimise ``|b - B x|`` for a symmetric ``B``.

    Args:
        matvec: ``v -> B v``.
        b: a dict of tensors, not empty.
        x0: where to start, zero by default. Costs one product.
        precondition: ``r -> M^-1 r``, symmetric positive definite even where ``B`` is not; one that
            is not ends the iteration as NOT_POSITIVE.
        tol: stop at ``|r| <= tol |b|``. Where ``|B r|`` is rounding beside ``|B| |r|``, in the
            preconditioner's norms, nothing is left to gain and it ends as STALLED: this is the
            least-squares solution of a system that has none.
        max_iter: at most so many products; one more gives the residual.

    Memory: seven vectors, nine with a preconditioner. Under a transform or a compiler all
    iterations run, and a problem that is finished stays as it is.
    """
    plain = is_eager((b, x0))
    x = {k: torch.zeros_like(v) for k, v in b.items()} if x0 is None else x0
    r2 = b if x0 is None else treemath.sub(b, matvec(x0))
    r1, z, residual = r2, r2, r2
    beta, size = treemath.norm(r2), treemath.norm(b)
    small, broken = beta <= tol * size, torch.zeros_like(beta, dtype=torch.bool)
    if precondition is not None:
        z = precondition(r2)
        beta, broken = _root(treemath.dot(r2, z))
    w = w2 = {k: torch.zeros_like(v) for k, v in b.items()}
    old_beta = torch.zeros_like(beta)
    phibar, dbar, epsilon = beta, torch.zeros_like(beta), torch.zeros_like(beta)
    cosine, sine = -torch.ones_like(beta), torch.zeros_like(beta)
    norm2 = torch.zeros_like(beta)
    # Not tol: B r is small beside r as well where the matrix is merely ill-conditioned.
    rounding = torch.finfo(beta.dtype).eps ** (2 / 3)
    finite = torch.isfinite(beta)
    reason = torch.full_like(beta, Stop.MAX_ITERATIONS.value, dtype=torch.int64)
    reason = torch.where(small, Stop.RESIDUAL.value, reason)
    reason = torch.where(broken, Stop.NOT_POSITIVE.value, reason)
    reason = torch.where(finite, reason, Stop.NOT_FINITE.value)
    active, iterations = finite & ~small & ~broken, torch.zeros_like(reason)

    for i in range(max_iter):
        if plain and not bool(active):
            break
        v = treemath.mul(z, 1 / _nonzero(beta))
        y = matvec(v)
        if i:
            y = treemath.add(y, r1, -beta / _nonzero(old_beta))
        alpha = treemath.dot(v, y)
        y = treemath.add(y, r2, -alpha / _nonzero(beta))
        r1, r2, z, old_beta = r2, y, y, beta
        if precondition is None:
            beta = treemath.norm(y)
        else:
            z = precondition(y)
            beta, broken = _root(treemath.dot(y, z))
        # The squared Frobenius norm of T; the first beta is not of it, but that of b.
        norm2 = norm2 + alpha**2 + beta**2 + (old_beta**2 if i else 0)
        # The next column of T, turned by the last rotation, and the rotation that removes beta.
        old_epsilon, delta = epsilon, cosine * dbar + sine * alpha
        gbar = sine * dbar - cosine * alpha
        epsilon, dbar = sine * beta, -cosine * beta
        # |B r| of the previous iterate, before this one.
        slope = phibar * torch.hypot(gbar, dbar)
        gamma = _nonzero(torch.hypot(gbar, beta))
        cosine, sine = gbar / gamma, beta / gamma
        new_phibar = phibar * sine
        w1, w2 = w2, w
        w = treemath.add(treemath.add(v, w1, -old_epsilon), w2, -delta)
        w = treemath.mul(w, 1 / gamma)
        finite = torch.isfinite(alpha) & torch.isfinite(beta) & torch.isfinite(new_phibar)
        # Of a singular system nothing is left to gain once B r vanishes.
        flat = active & finite & (slope <= rounding * norm2.sqrt() * phibar) & (i > 0)
        moves = active & finite & ~flat & ~broken
        step = cosine * phibar
        x = {k: torch.where(moves, t + step * w[k], t) for k, t in x.items()}
        iterations = iterations + moves.long()
        phibar = torch.where(moves, new_phibar, phibar)
        length = phibar
        if precondition is not None:
            # phibar is the preconditioner's norm of the residual; its own takes the vector.
            residual = treemath.mul(residual, sine**2)
            residual = treemath.add(residual, r2, -cosine * new_phibar / _nonzero(beta))
            length = treemath.norm(residual)
        small = length <= tol * size
        reason = torch.where(active & ~finite, Stop.NOT_FINITE.value, reason)
        reason = torch.where(active & finite & broken, Stop.NOT_POSITIVE.value, reason)
        reason = torch.where(flat, Stop.STALLED.value, reason)
        reason = torch.where(moves & small, Stop.RESIDUAL.value, reason)
        active = moves & ~small

    return Solution(x, treemath.sub(b, matvec(x)), iterations, reason)


def _root(square: Tensor) -> tuple[Tensor, Tensor]:
    """The root of a squared norm, and whether it is none."""
    return square.clamp_min(0).sqrt(), square < 0


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)
