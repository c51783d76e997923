"""MINRES: the least residual over a Krylov space, for any symmetric matrix.

The method combines Lanczos' recursion with Givens rotations (Paige & Saunders 1975). The norm of
the residual, :math:`|b - B x|`, decreases in every iteration, even if the matrix is indefinite or
singular. If a singular system has solutions, the method finds the one of least norm. With a
preconditioner, Lanczos' recursion uses the inner product of :math:`M^{-1}`, and it is
:math:`(r^T M^{-1} r)^{1/2}` that decreases in every iteration.
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
    """Minimize ``|b - B x|`` for a symmetric matrix B by MINRES (Paige & Saunders 1975).

    The method keeps seven vectors in memory, or nine with a preconditioner. Under a transform or a
    compiler, all ``max_iter`` iterations run, and a finished problem does not change any more.

    Args:
        matvec: the product ``v -> B v``.
        b: the right-hand side, a dict of tensors that is not empty.
        x0: the first iterate, zero by default. It costs one product.
        precondition: the product ``r -> M^-1 r``. M must be symmetric positive definite, even if B
            is not. If ``r^T M^-1 r`` is negative, the iteration stops with NOT_POSITIVE.
        tol: stop with RESIDUAL at ``|r| <= tol |b|``, where r is the residual. If ``|B r|`` is as
            small as rounding errors relative to ``|B| |r|``, in the norms of the preconditioner,
            the residual cannot become smaller and the iteration stops with STALLED: the result is
            then the least-squares solution of a system without a solution.
        max_iter: the maximum number of products; one more computes the final residual.

    Returns:
        A :class:`Solution`. Costs one product per iteration, and one at the end.

    Example:
        >>> import torch, funcprecond as fp
        >>> indefinite = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> b = {"x": torch.tensor([2.0, 3.0])}
        >>> found = fp.linalg.minres(lambda v: {"x": indefinite @ v["x"]}, b)
        >>> torch.allclose(found.solution["x"], torch.tensor([3.0, 2.0]))
        True
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
    # This is not tol, because B r is also small relative to r if the matrix is ill-conditioned.
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
        # The squared Frobenius norm of T. The first beta is the norm of b and does not belong to T.
        norm2 = norm2 + alpha**2 + beta**2 + (old_beta**2 if i else 0)
        # Apply the last rotation to the next column of T, then find the one that eliminates beta.
        old_epsilon, delta = epsilon, cosine * dbar + sine * alpha
        gbar = sine * dbar - cosine * alpha
        epsilon, dbar = sine * beta, -cosine * beta
        # |B r| at the previous iterate.
        slope = phibar * torch.hypot(gbar, dbar)
        gamma = _nonzero(torch.hypot(gbar, beta))
        cosine, sine = gbar / gamma, beta / gamma
        new_phibar = phibar * sine
        w1, w2 = w2, w
        w = treemath.add(treemath.add(v, w1, -old_epsilon), w2, -delta)
        w = treemath.mul(w, 1 / gamma)
        finite = torch.isfinite(alpha) & torch.isfinite(beta) & torch.isfinite(new_phibar)
        # Once B r vanishes, which takes a singular system, the residual cannot become smaller.
        flat = active & finite & (slope <= rounding * norm2.sqrt() * phibar) & (i > 0)
        moves = active & finite & ~flat & ~broken
        step = cosine * phibar
        x = {k: torch.where(moves, t + step * w[k], t) for k, t in x.items()}
        iterations = iterations + moves.long()
        phibar = torch.where(moves, new_phibar, phibar)
        length = phibar
        if precondition is not None:
            # phibar is the residual's norm in M^-1; its Euclidean norm requires the vector.
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
    """The root of a squared norm, and whether the argument is negative, so that it is not one."""
    return square.clamp_min(0).sqrt(), square < 0


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)
