r"""Preconditioned conjugate gradients, for products with a curvature matrix that is never formed.

Minimises :math:`\phi(x) = \frac12 x^T B x - b^T x`, whose value at every iterate comes from the
residual at no cost, :math:`\phi(x) = -\frac12 x^T (b + r)`, and stops when it stalls: Martens' two
rules. One loop serves plain, vmapped and compiled calls: a problem that is finished stays as it is
while others go on, by ``where``. Only where nothing watches does the loop end early, after one host
read an iteration; the result is the same, since the iterations left out would have changed nothing.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.solution import Matvec, Stop
from funcprecond.tracing import is_eager
from funcprecond.tree import Params, state

__all__ = ["CGResult", "Rule", "cg", "has_stalled", "within"]

Rule = Literal["2010", "2012", "none"]


@state
class CGResult:
    """What :func:`cg` returns.

    Attributes:
        solution: the last iterate, shaped like ``b``.
        residual: ``b - B x`` there, by the recursion.
        iterations: how many changed the iterate, a 0-d integer.
        reason: a :class:`Stop`, as a 0-d integer.
        phi: (max_iter + 1,), the model's value from the start on; the last one repeats to the end.
        stored: (keep, ...) for each entry, the last of the iterates numbered ``ceil(1.3^j)``.
        stored_at: (keep,), their numbers, increasing; 0 where there were fewer.
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
    """Solve ``B x = b`` for a symmetric positive definite ``B``.

    Args:
        matvec: ``v -> B v``.
        b: a dict of tensors, not empty; so is every vector here.
        x0: where to start, zero by default. Costs one product.
        precondition: ``r -> M^-1 r``, symmetric positive definite.
        rule: when the model counts as stalled, see :func:`has_stalled`.
        max_iter: at most so many products.
        tol: stop at ``|r| <= tol |b|``.
        refresh: the residual is computed anew each so many iterations: its recursion drifts.
        keep: how many iterates to store for :attr:`CGResult.stored`.

    Where ``p^T B p <= 0`` it stops with the iterate that it has, and with ``b`` itself, steepest
    descent, if that is the first iteration. Memory: four vectors and ``keep`` more.
    """
    precondition = precondition or (lambda r: r)
    plain = is_eager((b, x0))
    x = {k: torch.zeros_like(v) for k, v in b.items()} if x0 is None else x0
    r = b if x0 is None else treemath.sub(b, matvec(x0))
    p = precondition(r)
    rz, size = treemath.dot(r, p), treemath.norm(b)
    finite = torch.isfinite(rz) & torch.isfinite(size)
    small = finite & (treemath.norm(r) <= tol * size)
    reason = torch.full_like(rz, Stop.MAX_ITERATIONS.value, dtype=torch.int64)
    reason = torch.where(finite, reason, Stop.NOT_FINITE.value)
    reason = torch.where(small, Stop.RESIDUAL.value, reason)
    active = finite & ~small
    iterations = torch.zeros_like(reason)
    phis, numbers = [_model_value(x, b, r)], _schedule(max_iter)
    # Built from x, so that they carry the transforms' levels that x does.
    stored = {k: torch.zeros_like(v).expand(keep, *v.shape) for k, v in x.items()}
    stored_at = torch.zeros_like(reason).expand(keep)

    for i in range(1, max_iter + 1):
        if plain and not bool(active):
            break
        product = matvec(p)
        curvature = treemath.dot(p, product)
        positive = curvature > 0
        alpha = rz / torch.where(positive, curvature, 1)
        new_x = treemath.add(x, p, alpha)
        new_r = (
            treemath.sub(b, matvec(new_x)) if i % refresh == 0 else treemath.add(r, product, -alpha)
        )
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

        small, stalled = new_size <= tol * size, has_stalled(phis, rule)
        reason = torch.where(moves & stalled, Stop.STALLED.value, reason)
        reason = torch.where(moves & small, Stop.RESIDUAL.value, reason)
        reason = torch.where(active & ~finite, Stop.NOT_FINITE.value, reason)
        reason = torch.where(descend, Stop.NOT_POSITIVE.value, reason)
        active = moves & ~small & ~stalled
        p = treemath.add(z, p, new_rz / torch.where(rz == 0, 1, rz))
        rz = new_rz

    phis += [phis[-1]] * (max_iter + 1 - len(phis))
    return CGResult(x, r, iterations, reason, torch.stack(phis), stored, stored_at)


def has_stalled(phi: Sequence[Tensor], rule: Rule = "2012") -> Tensor:
    """Whether the model improves too slowly to go on, a 0-d boolean.

    Args:
        phi: its values at the iterates 0 to i, each 0-d.
        rule: "2010", ``(φ_i - φ_{i-k}) / φ_i < 5e-4 k`` (Martens 2010); "2012",
            ``(φ_i - φ_{i-k}) / (φ_i - φ_0) < 1e-4`` (Martens & Sutskever 2012, with φ_0 so that a
            warm start does not look like progress); both with ``k = max(10, i / 10)``, for
            ``i > k`` and ``φ_i < 0`` only. "none" never stops.
    """
    i = len(phi) - 1
    k = max(10, i // 10)
    if rule == "none" or i <= k:
        return torch.zeros_like(phi[-1], dtype=torch.bool)
    gain = phi[i] - phi[i - k]
    whole, limit = (phi[i], 5e-4 * k) if rule == "2010" else (phi[i] - phi[0], 1e-4)
    return (phi[i] < 0) & (gain / torch.where(whole == 0, -1, whole) < limit)


def within(operator: Matvec, params: Params, names: Sequence[str]) -> Matvec:
    """The block of an operator on ``params`` that belongs to some of them.

    What a method in a :func:`funcprecond.partition` works with; all of ``params`` otherwise.
    Vectors are cast to the parameters' dtypes, and products back.
    """

    def block(vector: Params) -> Params:
        product = operator(treemath.fill(vector, params))
        return {k: product[k].to(vector[k].dtype) for k in names}

    return block


def _schedule(max_iter: int) -> frozenset[int]:
    """The numbers of the iterates that are stored: ``ceil(1.3^j)``."""
    last = math.ceil(math.log(max(max_iter, 1), 1.3))
    return frozenset(math.ceil(1.3**j) for j in range(last + 1))


def _model_value(x: Params, b: Params, r: Params) -> Tensor:
    return -0.5 * treemath.dot(x, treemath.add(b, r))


def _push(window: Tensor, new: Tensor) -> Tensor:
    return torch.cat([window[1:], new.unsqueeze(0)])
