"""Hessian-free: a damped Newton step by conjugate gradients, without forming any matrix."""

import functools
from typing import Literal

import torch
from torch import Tensor

from funcprecond.checks import at_least, one_of
from funcprecond.curvature.ggn import GGNOperator
from funcprecond.curvature.hessian import HessianOperator
from funcprecond.curvature.objective import Objective
from funcprecond.curvature.per_sample import PerSampleGrads
from funcprecond.evidence import Evidence, required
from funcprecond.linalg import treemath
from funcprecond.linalg.conjugate_gradients import CGResult, Rule, cg, within
from funcprecond.linalg.levenberg_marquardt import levenberg_marquardt, reduction_ratio
from funcprecond.linalg.line_search import armijo, best_iterate
from funcprecond.methods.card import card
from funcprecond.tracing import is_eager
from funcprecond.transform import Transform, fitted
from funcprecond.tree import Params, state

__all__ = ["HessianFreeState", "hessian_free"]


@state
class HessianFreeState:
    """The last solution of CG, in float32 or wider, and the damping λ, a 0-d tensor."""

    solution: Params
    damping: Tensor


@card(
    "Hessian-free (Martens 2010)",
    curvature="H, G",
    representation="full, matrix-free",
    solver="L iter, conjugate gradient",
    learning_rate=1.0,
    carries_momentum=True,
    options={"damping": 0.1, "adapt": False, "max_iter": 10, "trials": 20},
)
def hessian_free(
    *,
    curvature: Literal["ggn", "hessian"] = "ggn",
    damping: float | Tensor = 1.0,
    adapt: bool = True,
    max_iter: int = 250,
    rule: Rule = "2012",
    tol: float | Tensor = 1e-5,
    zeta: float | Tensor = 0.95,
    preconditioner: Literal["none", "fisher"] = "none",
    backtracking: int = 8,
    trials: int = 60,
) -> Transform:
    """Hessian-free optimization (Martens, ICML 2010; Martens & Sutskever 2012).

    Each step minimizes a quadratic model φ of the loss f on one batch by conjugate gradients (CG).
    B is the Gauss-Newton matrix, or the Hessian, plus λ I::

        p <- CG on  φ(x) = xᵀ B x / 2 + gᵀ x,  from ζ times the last solution x_0, until φ stalls
        ρ = (f(θ + p) - f(θ + x_0)) / (φ(p) - φ(x_0));   λ <- 3/2 λ if ρ < 1/4,  2/3 λ if ρ > 3/4
        p <- the best CG iterate, searched backwards from the last while the loss decreases
        d = -α p,  α the first of 1, 0.8, 0.8², ... with f(θ + α p) <= f(θ) + 0.01 α gᵀ p, or 0

    A zero or non-finite gradient gives the direction 0 and leaves the state unchanged.

    Args:
        curvature: "ggn" for the Gauss-Newton matrix, or "hessian"; CG with the Hessian ends when it
            finds negative curvature.
        damping: the initial λ, in units of the loss.
        adapt: whether the rule above (Levenberg-Marquardt) changes λ. It measures how well φ fits
            this batch, which is too optimistic where batches are small: λ becomes too small.
        max_iter, rule, tol: when CG ends, see :func:`funcprecond.linalg.cg`. Choose a small
            ``max_iter`` for ``torch.compile``, which unrolls all iterations.
        zeta: ζ, the factor of the warm start.
        preconditioner: "none", or "fisher" to precondition CG by ``(d + λ)^0.75`` with d the
            diagonal of the empirical Fisher matrix, which needs per-sample gradients.
        backtracking: the number of stored CG iterates that the backward search may try.
        trials: the maximal number of step lengths α to try.

    Returns:
        A method whose learning rate is 1. A step costs up to ``max_iter`` products of about 2
        gradients each, and a dozen losses. The state is one copy of the parameters.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.hessian_free(damping=0.1, max_iter=30)    # no fp.scale: it chooses the length
    """
    one_of(("ggn", "hessian"), curvature=curvature)
    one_of(("2010", "2012", "none"), rule=rule)
    one_of(("none", "fisher"), preconditioner=preconditioner)
    at_least(1, max_iter=max_iter, trials=trials)
    at_least(0, backtracking=backtracking)
    operator = GGNOperator() if curvature == "ggn" else HessianOperator()
    objective, rows = Objective(), PerSampleGrads()
    wanted = (operator, objective, *((rows,) if preconditioner == "fisher" else ()))

    def init(params: Params) -> HessianFreeState:
        return HessianFreeState(treemath.zeros_like(params), treemath.scalar_like(params, damping))

    def update(
        state: HessianFreeState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[HessianFreeState, Params]:
        evidence = required(evidence, *wanted)
        loss_after = evidence[objective].loss_after
        eager = is_eager((evidence.params, grads, state))
        g = treemath.cast(grads, state.solution)
        size = treemath.norm(g)
        usable = (size > 0) & torch.isfinite(size)
        # Without a usable gradient CG gets a zero right-hand side and ends at once.
        b = treemath.where(usable, treemath.mul(g, -1.0), 0.0)
        start = treemath.where(usable, treemath.mul(state.solution, zeta), 0.0)
        found = solve(b, start, state.damping, evidence)
        last = loss_after(found.solution)
        ratio = reduction_ratio(last - loss_after(start), found.phi[-1] - found.phi[0])
        step, loss = best_iterate(loss_after, found, last, eager=eager)

        def along(alpha: Tensor) -> Tensor:
            return loss_after(treemath.mul(step, alpha))

        options = {"c1": 1e-2, "shrink": 0.8, "trials": trials, "first": loss, "eager": eager}
        alpha = armijo(along, evidence.loss, treemath.dot(g, step), **options)
        good = (ratio >= 0) & (found.iterations > 0)
        kept = treemath.where(usable, treemath.where(good, found.solution, 0.0), state.solution)
        lam = levenberg_marquardt(state.damping, ratio) if adapt else state.damping
        direction = treemath.where(usable, treemath.mul(step, -alpha), 0.0)
        return HessianFreeState(kept, lam), treemath.cast(direction, grads)

    def solve(b: Params, start: Params, lam: Tensor, evidence: Evidence) -> CGResult:
        product = within(evidence[operator], evidence.params, list(b))

        def damped(v: Params) -> Params:
            return treemath.add(product(v), v, lam)

        precondition = None
        if preconditioner == "fisher":
            d = evidence[rows].diagonal()
            m = {k: (d[k].to(x.dtype) + lam) ** 0.75 for k, x in b.items()}
            precondition = functools.partial(treemath.div, y=m)
        options = {"rule": rule, "max_iter": max_iter, "tol": tol, "keep": backtracking}
        return cg(damped, b, start, precondition=precondition, **options)

    return fitted(Transform(init, update, lambda t: wanted), lambda state: state.solution)
