"""Hessian-free: a damped Newton step by conjugate gradients, with no matrix formed."""

import functools
from typing import Literal

import torch
from torch import Tensor

from funcprecond.checks import at_least, one_of
from funcprecond.curvature.ggn import GGNOperator
from funcprecond.curvature.hessian import HessianOperator
from funcprecond.curvature.objective import Objective
from funcprecond.curvature.per_sample import PerSampleGrads
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.linalg import treemath
from funcprecond.linalg.conjugate_gradients import CGResult, Rule, cg, within
from funcprecond.linalg.levenberg_marquardt import levenberg_marquardt, reduction_ratio
from funcprecond.linalg.line_search import armijo, best_iterate
from funcprecond.methods.card import card
from funcprecond.tracing import is_eager
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["HessianFreeState", "hessian_free"]


@state
class HessianFreeState:
    """The last CG solution, in float32 or wider; and the damping λ, a 0-d tensor."""

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
    """The Hessian-free step (Martens, ICML 2010; Martens & Sutskever, 2012).

    On one batch, with B the Gauss-Newton matrix (or the Hessian) plus λ I, and f the loss::

        p <- CG on  φ(x) = xᵀ B x / 2 + gᵀ x,  from ζ times the last solution x_0, until φ stalls
        ρ = (f(θ + p) - f(θ + x_0)) / (φ(p) - φ(x_0));   λ <- 3/2 λ if ρ < 1/4,  2/3 λ if ρ > 3/4
        p <- the best of the iterates, from the last backwards while the loss decreases
        d = -α p,  α the first of 1, 0.8, 0.8², ... with f(θ + α p) <= f(θ) + 0.01 α gᵀ p, or 0

    A zero or non-finite gradient has direction 0 and leaves the state as it was.

    Args:
        curvature: "ggn", or "hessian", whose CG ends where it meets negative curvature.
        damping: λ to start from, in the loss's units.
        adapt: whether λ follows Levenberg and Marquardt's rule. It asks how well the model predicts
            this batch, which says little of the others where batches are small: λ falls too far.
        max_iter, rule, tol: when CG ends, see :func:`funcprecond.linalg.cg`. ``torch.compile``
            unrolls all iterations: take a small ``max_iter`` there.
        zeta: ζ, of the warm start.
        preconditioner: "fisher" divides residuals by ``(d + λ)^0.75``, d the diagonal of the
            empirical Fisher matrix; it needs the batch's per-sample gradients.
        backtracking: how many stored iterates may be tried in the place of the last, or 0.
        trials: at most so many step sizes.

    Returns:
        A method whose learning rate is 1. It needs at most ``max_iter`` products of about 2
        gradients, and a dozen losses; it keeps one copy of the parameters.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.hessian_free(damping=0.1, max_iter=30)
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
        if evidence is None:
            msg = f"hessian_free needs {operator} beside the gradient: pass fp.observe's evidence"
            raise MissingEvidence(msg)
        eager, loss_after = (
            is_eager((evidence.params, grads, state)),
            evidence[objective].loss_after,
        )
        g = {k: x.to(state.solution[k].dtype) for k, x in grads.items()}
        size = treemath.norm(g)
        usable = (size > 0) & torch.isfinite(size)
        # Nothing to solve for otherwise: CG on a zero right-hand side from zero ends at once.
        b = {k: torch.where(usable, -x, 0) for k, x in g.items()}
        start = {k: torch.where(usable, zeta * x, 0) for k, x in state.solution.items()}
        found = solve(b, start, state.damping, evidence)
        last = loss_after(found.solution)
        ratio = reduction_ratio(last - loss_after(start), found.phi[-1] - found.phi[0])
        step, loss = best_iterate(loss_after, found, last, eager=eager)
        alpha = armijo(
            lambda a: loss_after(treemath.mul(step, a)),
            evidence.loss,
            treemath.dot(g, step),
            c1=1e-2,
            shrink=0.8,
            trials=trials,
            first=loss,
            eager=eager,
        )
        kept = {
            k: torch.where(usable, torch.where(ratio < 0, 0, x), state.solution[k])
            for k, x in found.solution.items()
        }
        lam = state.damping
        if adapt:
            moved = usable & (found.iterations > 0)
            lam = torch.where(moved, levenberg_marquardt(lam, ratio), lam)
        direction = {k: torch.where(usable, -alpha * x, 0) for k, x in step.items()}
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

    return Transform(init, update, lambda t: wanted)
