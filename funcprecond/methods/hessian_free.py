"""Hessian-free: a damped Newton step by conjugate gradients, with no matrix formed.

Row: H or G, full, matrix-free, conjugate gradient. Martens, ICML 2010; Martens & Sutskever, 2012.
On one batch, with B the Gauss-Newton matrix (or the Hessian) plus λ I::

    p <- CG on  φ(x) = xᵀ B x / 2 + gᵀ x,  from ζ times the last solution, until φ stalls
    ρ = (f(θ + p) - f(θ + x_0)) / (φ(p) - φ(x_0));   λ <- 3/2 λ if ρ < 1/4,  2/3 λ if ρ > 3/4
    p <- the best of the iterates, from the last backwards while the loss decreases
    d = -α p,  α the first of 1, 0.8, 0.8², ... with f(θ + α p) <= f(θ) + 0.01 α gᵀ p, or 0

Needs products and the objective of this batch. At most ``max_iter`` products of about 2 gradients,
and a dozen losses. State: one copy of the parameters and λ. The learning rate is 1. A zero or
non-finite gradient has direction 0 and leaves the state as it was.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from funcprecond.curvature.ggn import GGNOperator
from funcprecond.curvature.hessian import HessianOperator
from funcprecond.curvature.objective import Objective
from funcprecond.curvature.per_sample import PerSampleGrads
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.linalg import treemath
from funcprecond.linalg.conjugate_gradients import CGResult, Operator, cg, within
from funcprecond.linalg.levenberg_marquardt import levenberg_marquardt, reduction_ratio
from funcprecond.linalg.line_search import armijo, backtrack
from funcprecond.linalg.precision import factor_dtype
from funcprecond.methods.table import Card
from funcprecond.need import Need
from funcprecond.tracing import is_eager
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["HessianFreeState", "hessian_free"]


@state
class HessianFreeState:
    """Attributes: the last CG solution in float32 or wider; the damping λ, a 0-d tensor."""

    solution: Params
    damping: Tensor


def hessian_free(
    *,
    curvature: Literal["ggn", "hessian"] = "ggn",
    damping: float | Tensor = 1.0,
    adapt: bool = True,
    max_iter: int = 250,
    rule: Literal["2010", "2012", "none"] = "2012",
    tol: float | Tensor = 1e-5,
    zeta: float | Tensor = 0.95,
    preconditioner: Literal["none", "fisher"] = "none",
    backtracking: int = 8,
    trials: int = 60,
) -> Transform:
    """The Hessian-free step, as a direction for the learning rate 1.

    Args:
        curvature: "ggn", or "hessian", whose CG ends where it meets negative curvature.
        damping: λ to start from, in the loss's units.
        adapt: whether λ follows Levenberg and Marquardt's rule. It asks how well the model predicts
            this batch, which says little of the others where batches are small: λ falls too far.
        max_iter, rule, tol: when CG ends, see :func:`funcprecond.linalg.conjugate_gradients.cg`. ``torch.compile``
            unrolls all iterations: take a small ``max_iter`` there.
        zeta: the warm start is this times the last solution.
        preconditioner: "fisher" divides residuals by ``(d + λ)^0.75``, d the diagonal of the
            empirical Fisher matrix; it needs the batch's per-example gradients.
        backtracking: how many stored iterates may be tried in the place of the last, or 0.
        trials: at most so many step sizes, each 0.8 times the one before.

    Raises:
        ValueError: an option is out of range.
    """
    for value, valid in (
        (curvature, ("ggn", "hessian")),
        (rule, ("2010", "2012", "none")),
        (preconditioner, ("none", "fisher")),
    ):
        if value not in valid:
            msg = f"{value!r} is not one of {', '.join(map(repr, valid))}"
            raise ValueError(msg)
    if max_iter < 1 or backtracking < 0 or trials < 1:
        msg = "max_iter and trials must be at least 1, backtracking at least 0"
        raise ValueError(msg)
    operator = GGNOperator() if curvature == "ggn" else HessianOperator()
    wanted: tuple[Need, ...] = (operator, Objective())
    wanted += (PerSampleGrads(),) if preconditioner == "fisher" else ()

    def init(params: Params) -> HessianFreeState:
        solution = {k: torch.zeros_like(p, dtype=factor_dtype(p)) for k, p in params.items()}
        return HessianFreeState(solution, _zero_like(solution) + damping)

    def update(
        state: HessianFreeState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[HessianFreeState, Params]:
        if evidence is None:
            msg = f"hessian_free needs {operator} beside the gradient: pass fp.observe's evidence"
            raise MissingEvidence(msg)
        g = {k: x.to(state.solution[k].dtype) for k, x in grads.items()}
        line = _Line(evidence, is_eager((evidence.params, grads, state)))
        size = treemath.norm(g)
        usable = (size > 0) & torch.isfinite(size)
        # Nothing to solve for otherwise: CG on a zero right-hand side from zero ends at once.
        b = {k: torch.where(usable, -x, 0) for k, x in g.items()}
        start = {k: torch.where(usable, zeta * x, 0) for k, x in state.solution.items()}
        found = solve(b, start, state.damping, evidence)

        loss = evidence.loss
        last = line.loss(found.solution)
        model = found.phi[-1] - found.phi[0]
        ratio = reduction_ratio(last - line.loss(start), model)
        step, step_loss = line.backtrack(found, last, backtracking)
        slope = treemath.dot(g, step)
        factor = line.armijo(step, step_loss, loss, slope, trials)

        moved = usable & (found.iterations > 0)
        kept = {
            k: torch.where(usable, torch.where(ratio < 0, 0, x), state.solution[k])
            for k, x in found.solution.items()
        }
        lam = state.damping
        if adapt:
            lam = torch.where(moved, levenberg_marquardt(lam, ratio), lam)
        direction = {
            k: torch.where(usable, -factor * x, 0).to(grads[k].dtype) for k, x in step.items()
        }
        return HessianFreeState(kept, lam), direction

    def solve(b: Params, start: Params, lam: Tensor, evidence: Evidence) -> CGResult:
        product = within(evidence[operator], evidence.params, list(b))

        def damped(v: Params) -> Params:
            return treemath.add(product(v), v, lam)

        return cg(
            damped,
            b,
            start,
            precondition=conditioned(b, lam, evidence),
            rule=rule,
            max_iter=max_iter,
            tol=tol,
            keep=backtracking,
        )

    def conditioned(b: Params, lam: Tensor, evidence: Evidence) -> Operator | None:
        if preconditioner == "none":
            return None
        diagonal = evidence[PerSampleGrads()].diagonal()
        m = {k: (diagonal[k].to(x.dtype) + lam) ** 0.75 for k, x in b.items()}
        return lambda r: {k: x / m[k] for k, x in r.items()}

    return Transform(init, update, lambda t: wanted)


@dataclasses.dataclass(frozen=True)
class _Line:
    """The losses of one step's trial points ``θ + p``."""

    evidence: Evidence
    plain: bool

    def loss(self, step: Params) -> Tensor:
        params = self.evidence.params
        there = {k: (params[k] + p).to(params[k].dtype) for k, p in step.items()}
        return self.evidence[Objective()].loss({**params, **there})

    def backtrack(self, found: CGResult, last: Tensor, n: int) -> tuple[Params, Tensor]:
        """The chosen iterate and its loss."""

        def iterate(j: int) -> Params:
            return {k: s[j] for k, s in found.stored.items()}

        # The last iterate, if stored, is not its own alternative.
        counts = (found.stored_at > 0) & (found.stored_at < found.iterations)
        index, loss = backtrack(lambda j: self.loss(iterate(j)), counts, last, plain=self.plain)
        step = found.solution
        for j in range(n):
            step = {k: torch.where(index == j, x, step[k]) for k, x in iterate(j).items()}
        return step, loss

    def armijo(
        self, step: Params, step_loss: Tensor, loss: Tensor, slope: Tensor, trials: int
    ) -> Tensor:
        """The step size; the loss at the first, 1, is known."""
        calls = iter([True])

        def loss_at(factor: Tensor) -> Tensor:
            return step_loss if next(calls, False) else self.loss(treemath.mul(step, factor))

        return armijo(loss_at, loss, slope, c1=1e-2, shrink=0.8, trials=trials, plain=self.plain)


def _zero_like(params: Params) -> Tensor:
    first = next(iter(params.values()), torch.zeros(()))
    return first.new_zeros(())


CARDS = (
    Card(
        "hessian_free",
        "Hessian-free (Martens 2010)",
        "H, G",
        "full, matrix-free",
        "L iter, conjugate gradient",
        hessian_free,
        learning_rate=1.0,
        momentum=True,
        options={"damping": 0.1, "adapt": False, "max_iter": 10, "trials": 20},
    ),
)
