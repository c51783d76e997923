r"""Preconditioned conjugate gradients, for products with a curvature matrix that is never formed.

The method minimizes :math:`\phi(x) = \frac12 x^T B x - b^T x`. The value at every iterate follows
from the residual at no cost, :math:`\phi(x) = -\frac12 x^T (b + r)`, and the iteration stops when
these values stall, by one of Martens' two rules.

One loop serves eager, vmapped and compiled calls: ``where`` keeps a finished problem unchanged
while others continue. Only an eager call ends the loop early, at the cost of one host read per
iteration. The result is the same, since the omitted iterations would change nothing.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.solution import Matvec, Stop
from funcprecond.linalg.true_residuals import AGAIN, Best, settle, unit
from funcprecond.tracing import is_eager
from funcprecond.tree import Params, state

__all__ = ["CGResult", "Rule", "cg", "has_stalled", "within"]

Rule = Literal["2010", "2012", "none"]


@state
class CGResult:
    """The result of :func:`cg`.

    Attributes:
        solution: the last iterate, shaped like ``b``.
        residual: ``b - B x`` at the last iterate. It is computed by a product where the reason is
            RESIDUAL, and in traced code; otherwise it is the recursion's.
        iterations: the number of iterations that changed the iterate, a 0-d integer tensor.
        reason: the :class:`Stop` value, a 0-d integer tensor.
        phi: (max_iter + 1,), the values of the model from the first iterate on; after the end of
            the iteration, the last value repeats.
        stored: (keep, ...) for each entry, the last ``keep`` of the iterates with the numbers
            ``ceil(1.3^j)``.
        stored_at: (keep,), the numbers of these iterates in increasing order, after zeros if there
            are fewer.
    """

    solution: Params
    residual: Params
    iterations: Tensor
    reason: Tensor
    phi: Tensor
    stored: Params
    stored_at: Tensor


def cg(
    matvec: Matvec,
    b: Params,
    x0: Params | None = None,
    *,
    precondition: Matvec | None = None,
    rule: Rule = "2012",
    max_iter: int = 250,
    tol: float | Tensor = 1e-5,
    refresh: int = 50,
    keep: int = 8,
) -> CGResult:
    """Solve ``B x = b`` for a symmetric positive definite matrix B by conjugate gradients.

    If ``p^T B p <= 0`` for a search direction p, the iteration stops and returns the current
    iterate. In the first iteration it returns ``b`` itself, the direction of steepest descent. The
    method keeps four vectors and ``keep`` iterates in memory.

    Args:
        matvec: the product ``v -> B v``.
        b: the right-hand side, a dict of tensors that is not empty, like every vector here.
        x0: the first iterate, zero by default. It costs one product.
        precondition: the product ``r -> M^-1 r``, where M is symmetric positive definite.
        rule: when the model counts as stalled: "2010" (Martens), "2012" (Martens & Sutskever) or
            "none"; see :func:`funcprecond.linalg.conjugate_gradients.has_stalled`.
        max_iter: the maximum number of iterations.
        tol: stop with RESIDUAL at ``|b - B x| <= tol |b|``. When the recursion's residual is that
            small, the true one is computed by a product. If it is larger, the method starts again
            from this iterate, and stops with STALLED if this does not halve the true residual: it
            is then as small as rounding permits.
        refresh: under a transform or a compiler, which cannot branch, the true residual is computed
            in every ``refresh``-th iteration and at the end. A problem that waits for it does not
            change.
        keep: the number of iterates in :attr:`CGResult.stored`.

    Returns:
        A :class:`CGResult`. Costs one product per iteration, one for ``x0``, and one for each
            residual that is checked, which is one in all unless rounding errors matter.

    Example:
        >>> import torch, funcprecond as fp
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> found = fp.linalg.cg(lambda v: {"x": matrix @ v["x"]}, {"x": torch.tensor([3.0, 3.0])})
        >>> torch.allclose(found.solution["x"], torch.ones(2)), int(found.iterations)
        (True, 1)
    """
    precondition = precondition or (lambda r: r)
    plain, one = is_eager((b, x0)), unit(b)
    b = treemath.mul(b, 1 / one)
    x = {k: torch.zeros_like(v) for k, v in b.items()} if x0 is None else treemath.mul(x0, 1 / one)
    r = b if x0 is None else treemath.sub(b, matvec(x))
    p = precondition(r)
    rz, size, limit = treemath.dot(r, p), treemath.norm(r), tol * treemath.norm(b)
    finite = torch.isfinite(rz) & torch.isfinite(limit)
    small = finite & (size <= limit)
    reason = torch.full_like(rz, Stop.MAX_ITERATIONS.value, dtype=torch.int64)
    reason = torch.where(finite, reason, Stop.NOT_FINITE.value)
    reason = torch.where(small, Stop.RESIDUAL.value, reason)
    active, claims = finite & ~small, torch.zeros_like(finite)
    iterations = torch.zeros_like(reason)
    best, goal = Best(x, r, torch.full_like(size, torch.inf)), limit
    phis, numbers = [_model_value(x, b, r)], _schedule(max_iter)
    # These are built from x, so that the same transforms batch them.
    stored = {k: torch.zeros_like(v).expand(keep, *v.shape) for k, v in x.items()}
    stored_at = torch.zeros_like(reason).expand(keep)

    for i in range(1, max_iter + 1):
        # An eager call checks a claim at once. Traced code cannot branch: it checks at intervals.
        if (plain and not bool(active)) or (not plain and i % refresh == 0):
            among = claims | torch.isfinite(best.size) if plain else claims
            if plain and not bool(among):
                break
            options = {"claims": claims, "among": among, "limit": limit, "reason": reason}
            best, _, again, reason = settle(matvec, b, x, best, begun=best.size, **options)
            x, r = _best_of(best, among, x, r)
            z = precondition(r)
            p = treemath.where(again, z, p)
            rz = torch.where(again, treemath.dot(r, z), rz)
            goal = torch.where(again, AGAIN * limit, goal)
            active, claims = active | again, torch.zeros_like(claims)
            if plain and not bool(active):
                break
        product = matvec(p)
        curvature = treemath.dot(p, product)
        positive = curvature > 0
        alpha = rz / torch.where(positive, curvature, 1)
        new_x, new_r = treemath.add(x, p, alpha), treemath.add(r, product, -alpha)
        z = precondition(new_r)
        new_rz, new_size = treemath.dot(new_r, z), treemath.norm(new_r)
        finite = torch.isfinite(curvature) & torch.isfinite(new_rz) & torch.isfinite(new_size)
        moves = active & positive & finite
        x, r = treemath.where(moves, new_x, x), treemath.where(moves, new_r, r)
        descend = active & ~positive & torch.isfinite(curvature)
        if i == 1 and not (plain and not bool(descend)):
            x, r = (
                treemath.where(descend, b, x),
                treemath.where(descend, treemath.sub(b, matvec(b)), r),
            )
        iterations = iterations + moves.long()
        phis.append(torch.where(active, _model_value(x, b, r), phis[-1]))
        if keep and i in numbers:
            stored = treemath.where(moves, {k: _push(s, x[k]) for k, s in stored.items()}, stored)
            stored_at = torch.where(moves, _push(stored_at, torch.full_like(reason, i)), stored_at)

        small, stalled = new_size <= goal, has_stalled(phis, rule)
        reason = torch.where(moves & stalled, Stop.STALLED.value, reason)
        reason = torch.where(active & ~finite, Stop.NOT_FINITE.value, reason)
        # In a pass that began at a checked iterate, rounding alone can have made this negative.
        indefinite = torch.where(torch.isinf(best.size), Stop.NOT_POSITIVE.value, Stop.STALLED)
        reason = torch.where(descend, indefinite, reason)
        claims, active = claims | (moves & small), moves & ~small & ~stalled
        p = treemath.add(z, p, new_rz / torch.where(rz == 0, 1, rz))
        rz = new_rz
    else:
        among = claims | torch.isfinite(best.size) | (not plain)
        if not plain or bool(among):
            options = {"claims": claims, "among": among, "limit": limit, "reason": reason}
            best, _, _, reason = settle(matvec, b, x, best, begun=best.size, **options)
            x, r = _best_of(best, among, x, r)

    phis += [phis[-1]] * (max_iter + 1 - len(phis))
    x, r, stored = (treemath.mul(v, one) for v in (x, r, stored))
    return CGResult(x, r, iterations, reason, torch.stack(phis) * one**2, stored, stored_at)


def has_stalled(phi: Sequence[Tensor], rule: Rule = "2012") -> Tensor:
    """Whether the model improves too slowly for the iteration to go on, a 0-d boolean.

    Args:
        phi: the values of the model at the iterates 0 to i, each 0-d.
        rule: "2010" is ``(φ_i - φ_{i-k}) / φ_i < 5e-4 k`` (Martens 2010). "2012" is
            ``(φ_i - φ_{i-k}) / (φ_i - φ_0) < 1e-4`` (Martens & Sutskever 2012), where φ_0 keeps a
            warm start from counting as progress. In both, ``k = max(10, i // 10)``, and the
            iteration goes on if ``i <= k`` or ``φ_i >= 0``. "none" never stops it.
    """
    i = len(phi) - 1
    k = max(10, i // 10)
    if rule == "none" or i <= k:
        return torch.zeros_like(phi[-1], dtype=torch.bool)
    gain = phi[i] - phi[i - k]
    whole, limit = (phi[i], 5e-4 * k) if rule == "2010" else (phi[i] - phi[0], 1e-4)
    return (phi[i] < 0) & (gain / torch.where(whole == 0, -1, whole) < limit)


def within(operator: Matvec, params: Params, names: Sequence[str]) -> Matvec:
    """The block of an operator on ``params`` that belongs to the named parameters.

    A method in a :func:`funcprecond.partition` works with such a block. Vectors are cast to the
    dtypes of ``params``, and the products back to those of the vector.
    """

    def block(vector: Params) -> Params:
        product = operator(treemath.fill(vector, params))
        return {k: product[k].to(vector[k].dtype) for k in names}

    return block


def _best_of(best: Best, among: Tensor, x: Params, r: Params) -> tuple[Params, Params]:
    """The best iterate and its residual; the given ones where they took no part, or are NaN."""
    known = among & torch.isfinite(best.size)
    return treemath.where(known, best.x, x), treemath.where(known, best.residual, r)


def _schedule(max_iter: int) -> frozenset[int]:
    """The numbers of the iterates that are stored: ``ceil(1.3^j)``."""
    last = math.ceil(math.log(max(max_iter, 1), 1.3))
    return frozenset(math.ceil(1.3**j) for j in range(last + 1))


def _model_value(x: Params, b: Params, r: Params) -> Tensor:
    return -0.5 * treemath.dot(x, treemath.add(b, r))


def _push(window: Tensor, new: Tensor) -> Tensor:
    return torch.cat([window[1:], new.unsqueeze(0)])
