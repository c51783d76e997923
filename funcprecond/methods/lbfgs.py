"""L-BFGS: an inverse Hessian from the last m steps and the changes of the gradient along them."""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.curvature.hessian import HessianOperator
from funcprecond.curvature.objective import Objective
from funcprecond.evidence import Evidence, is_due, required
from funcprecond.linalg import treemath
from funcprecond.linalg.bfgs import History
from funcprecond.linalg.conjugate_gradients import within
from funcprecond.linalg.line_search import search
from funcprecond.methods.card import card
from funcprecond.need import Every, Need, NotDue
from funcprecond.transform import Transform, counter, fitted
from funcprecond.tree import Params, map, state

__all__ = ["LBFGSState", "lbfgs"]


@state
class LBFGSState:
    """The state of L-BFGS.

    Attributes:
        history: the pairs, of all parameters as one vector, in float32 or wider.
        point: the parameters at the last step; with "hvp" pairs, the last mean iterate.
        grads: the last gradient with "successive" pairs; empty otherwise.
        total, count: with "hvp" pairs, the sum and the number of the iterates since the last pair;
            with other pairs, empty and the number of steps.
    """

    history: History
    point: Params
    grads: Params
    total: Params
    count: Tensor


@card(
    "L-BFGS (Liu & Nocedal 1989)",
    curvature="Ĥ_bfgs",
    representation="full, matrix-free",
    solver="G iter, BFGS",
    learning_rate=0.3,
    carries_momentum=True,
    options={"curvature_fix": "powell"},
)
def lbfgs(
    *,
    history: int = 10,
    pairs: Literal["same_batch", "successive", "hvp"] = "same_batch",
    curvature_fix: Literal["none", "powell"] = "none",
    min_curvature: float | Tensor = 1e-4,
    every: int = 10,
    line_search: Literal["none", "armijo", "wolfe"] = "none",
    trials: int = 20,
) -> Transform:
    """L-BFGS (Liu & Nocedal, Mathematical Programming 45, 1989).

    The inverse Hessian H is built from the last m pairs of a step s and the change y of the
    gradient along it. ρ = 1 / s.y, and γ = s.y / y.y comes from the newest pair::

        s = θ_t - θ_{t-1},     y = ∇L_t(θ_t) - ∇L_t(θ_{t-1}),     kept if s.y >= min_curvature |s|²
        d = H_m g,   H_i = (I - ρ s yᵀ) H_{i-1} (I - ρ y sᵀ) + ρ s sᵀ,   H_0 = γ I

    Before the first pair, d is the gradient, scaled to a 1-norm of at most 1. A non-finite gradient
    leaves the history unchanged, but its own direction is not finite.

    Args:
        history: m, the number of pairs that are kept.
        pairs, every: "same_batch" takes both gradients on the current batch (Schraudolph, Yu &
            Günter 2007). "successive" takes those of two steps, for full batches only, because on
            different batches y measures noise. "hvp" takes the Hessian's product with the
            difference of two mean iterates, every ``every`` steps (Byrd et al., arXiv 1401.7020).
        curvature_fix: "powell" moves y towards ``s / γ`` until ``s.y >= 0.2 s.s / γ``; or "none".
        min_curvature: the least s.y / s.s of a pair, which bounds γ by ``1 / min_curvature``.
        line_search, trials: "armijo" (c1 = 1e-4, halving; a loss for each trial) or strong "wolfe"
            (c2 = 0.9; a gradient for each trial), on the current batch, for a learning rate of 1.
            If none of ``trials`` points is accepted, d is 0.

    Returns:
        A method that needs one more gradient for each step with "same_batch" pairs. Its state is
        2 m copies of the parameters and one or two more; a step takes 4 m P operations.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.lbfgs(history=5, line_search="wolfe")
    """
    one_of(("same_batch", "successive", "hvp"), pairs=pairs)
    one_of(("none", "powell"), curvature_fix=curvature_fix)
    one_of(("none", "armijo", "wolfe"), line_search=line_search)
    objective, operator, due = Objective(), HessianOperator(), Every("pair", every)

    def init(params: Params) -> LBFGSState:
        past = History.init(history, treemath.ravel_wide(params))
        zeros = map(torch.zeros_like, params)
        grads, total = (zeros if pairs == kind else {} for kind in ("successive", "hvp"))
        return LBFGSState(past, map(torch.clone, params), grads, total, counter(params))

    def update(
        state: LBFGSState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[LBFGSState, Params]:
        evidence = required(evidence)
        state, g = with_pair(state, grads, evidence), treemath.ravel_wide(grads)
        d = state.history.apply(g)
        d = d * torch.where(state.history.filled() == 0, (1 / g.abs().sum()).clamp_max(1.0), 1.0)
        direction, slope = treemath.unravel(d, grads), -d.dot(g)
        if line_search != "none":
            options = {"rule": line_search, "trials": trials}
            direction = search(evidence[objective], evidence.loss, slope, direction, **options)
        return state, treemath.cast(direction, grads)

    def with_pair(state: LBFGSState, grads: Params, evidence: Evidence) -> LBFGSState:
        point = {k: evidence.params[k] for k in grads}
        s, count = treemath.sub(point, state.point), state.count + 1
        if pairs == "same_batch":
            gradient, here = evidence[objective].gradient, evidence.grads
            _, before = gradient({**evidence.params, **state.point})
            here = here if evidence.is_own(here) else gradient(evidence.params)[1]
            y = {k: here[k] - before[k] for k in grads}
            return LBFGSState(pushed(state.history, s, y), point, {}, {}, count)
        if pairs == "successive":
            s, y = treemath.mul(s, state.count > 0), treemath.sub(grads, state.grads)
            return LBFGSState(pushed(state.history, s, y), point, grads, {}, count)
        total = treemath.add(state.total, point)
        if not is_due(due, evidence, operator):
            return LBFGSState(state.history, state.point, {}, total, count)
        mean = {k: (x / count).to(x.dtype) for k, x in total.items()}
        s = treemath.sub(mean, state.point)
        new = pushed(state.history, s, within(evidence[operator], evidence.params, list(grads))(s))
        return LBFGSState(new, mean, {}, *map(torch.zeros_like, (total, count)))

    def pushed(old: History, s: Params, y: Params) -> History:
        options = {"min_curvature": min_curvature, "curvature_fix": curvature_fix}
        return old.push(treemath.ravel_wide(s), treemath.ravel_wide(y), **options)

    def needs(t: int) -> tuple[Need, ...]:
        wanted = (objective,) if pairs == "same_batch" or line_search != "none" else ()
        # At step 0 there is no second mean of iterates yet.
        now = (operator, due) if t and due.due(t) else (NotDue(due),)
        return (*wanted, *now) if pairs == "hvp" else wanted

    return fitted(Transform(init, update, needs), lambda state: state.point)
