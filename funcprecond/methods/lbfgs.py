"""L-BFGS: an inverse Hessian from the last m steps and the changes of the gradient along them."""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.checks import at_least, one_of
from funcprecond.curvature.hessian import HessianOperator
from funcprecond.curvature.objective import Objective
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.linalg import treemath
from funcprecond.linalg.bfgs import History, powell
from funcprecond.linalg.conjugate_gradients import within
from funcprecond.linalg.line_search import search
from funcprecond.methods.card import card
from funcprecond.need import Every, Need
from funcprecond.tracing import is_eager
from funcprecond.transform import Transform, counter
from funcprecond.tree import Params, state

__all__ = ["LBFGSState", "lbfgs"]


@state
class LBFGSState:
    """What the next pair is made from, and the pairs.

    Attributes:
        history: the pairs, over all parameters as one vector in float32 or wider.
        point: the parameters at the last step; with "hvp" pairs, the last mean of iterates.
        grads: with "successive" pairs the last gradient; empty otherwise.
        total: with "hvp" pairs the sum of the iterates since the last pair; empty otherwise.
        count: how many iterates are in ``total``, with other pairs the steps so far; 0-d.
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

    With pairs (s, y) kept in two (m, P) windows, ρ = 1 / s.y and γ = s.y / y.y of the newest::

        s = θ_t - θ_{t-1}        y = ∇L_t(θ_t) - ∇L_t(θ_{t-1})        kept if s.y >= min_curvature |s|²
        d = H_m g,   H_i = (I - ρ s yᵀ) H_{i-1} (I - ρ y sᵀ) + ρ s sᵀ,   H_0 = γ I

    Until there is a pair, d is the gradient, scaled to a 1-norm of at most 1. A non-finite gradient
    leaves the history alone, and its own direction is not finite.

    Args:
        history: m, how many pairs are kept.
        pairs: "same_batch" takes both gradients on this step's batch (Schraudolph, Yu & Günter,
            2007), "successive" the gradients of two steps, for full batches, because on different
            batches they measure noise; "hvp" takes the Hessian's product with the difference of two
            means of iterates, each ``every`` steps (Byrd et al., arXiv 1401.7020).
        curvature_fix: "powell" mixes a ``y`` with little curvature with ``s / γ`` until
            ``s.y >= 0.2 s.s / γ``, where "none" leaves the pair to ``min_curvature``.
        min_curvature: it bounds γ by its inverse. In the loss's units.
        every: the steps from one pair to the next, with "hvp" pairs.
        line_search: "armijo" (c1 1e-4, halving; a loss for each trial) or strong "wolfe" (c2 0.9; a
            gradient for each trial), on this step's batch; a direction without an accepted point
            is 0. Both are for a learning rate of 1.
        trials: at most so many points on a line.

    Returns:
        A method that needs one more gradient for each step with "same_batch" pairs. It keeps 2 m P
        numbers; each step takes 4 m P operations.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.lbfgs(history=5, line_search="wolfe")
    """
    one_of(("same_batch", "successive", "hvp"), pairs=pairs)
    one_of(("none", "powell"), curvature_fix=curvature_fix)
    one_of(("none", "armijo", "wolfe"), line_search=line_search)
    at_least(1, history=history, trials=trials)
    objective, operator, due = Objective(), HessianOperator(), Every("pair", every)

    def init(params: Params) -> LBFGSState:
        return LBFGSState(
            History.init(history, treemath.ravel_wide(params)),
            {k: p.clone() for k, p in params.items()},
            _zeros(params) if pairs == "successive" else {},
            _zeros(params) if pairs == "hvp" else {},
            counter(params),
        )

    def update(
        state: LBFGSState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[LBFGSState, Params]:
        if evidence is None:
            msg = "lbfgs needs to know the parameters too: pass fp.observe's evidence to update"
            raise MissingEvidence(msg)
        state = take_pair(state, grads, evidence)
        g = treemath.ravel_wide(grads)
        d = state.history.apply(g)
        first = (1 / g.abs().sum()).clamp_max(1.0)
        d = d * torch.where(state.history.filled() == 0, first, 1.0)
        direction = treemath.unravel(d, grads)
        if line_search != "none":
            step, slope = treemath.mul(direction, -1.0), -d.dot(g)
            eager = is_eager((evidence.params, direction))
            options = {"rule": line_search, "trials": trials, "eager": eager}
            alpha = search(evidence[objective], evidence.loss, slope, step, **options)
            direction = treemath.mul(direction, alpha)
        return state, treemath.cast(direction, grads)

    def take_pair(state: LBFGSState, grads: Params, evidence: Evidence) -> LBFGSState:
        point = {k: evidence.params[k] for k in grads}
        if pairs == "same_batch":
            _, before = evidence[objective].gradient({**evidence.params, **state.point})
            s = treemath.sub(point, state.point)
            new = pushed(state.history, s, {k: evidence.grads[k] - before[k] for k in grads})
            return LBFGSState(new, point, {}, {}, state.count + 1)
        if pairs == "successive":
            s = treemath.mul(treemath.sub(point, state.point), state.count > 0)
            new = pushed(state.history, s, treemath.sub(grads, state.grads))
            return LBFGSState(new, point, grads, {}, state.count + 1)
        total, count = treemath.add(state.total, point), state.count + 1
        if due not in evidence:
            return LBFGSState(state.history, state.point, {}, total, count)
        mean = {k: (x / count).to(x.dtype) for k, x in total.items()}
        s = treemath.sub(mean, state.point)
        new = pushed(state.history, s, within(evidence[operator], evidence.params, list(grads))(s))
        return LBFGSState(new, mean, {}, _zeros(total), torch.zeros_like(count))

    def pushed(old: History, s: Params, y: Params) -> History:
        flat_s, flat_y = treemath.ravel_wide(s), treemath.ravel_wide(y)
        if curvature_fix == "powell":
            flat_y = powell(flat_s, flat_y, flat_s / old.gamma.to(flat_s.dtype))
        return old.push(flat_s, flat_y, min_curvature=min_curvature)

    def needs(t: int) -> tuple[Need, ...]:
        wanted = (objective,) if pairs == "same_batch" or line_search != "none" else ()
        # At step 0 there is no second mean of iterates yet.
        return (*wanted, operator, *due.due(t)) if pairs == "hvp" and t and due.due(t) else wanted

    return Transform(init, update, needs)


def _zeros(params: Params) -> Params:
    return {k: torch.zeros_like(p) for k, p in params.items()}
