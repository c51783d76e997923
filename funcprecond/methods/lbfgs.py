"""L-BFGS: an inverse Hessian from the last m steps and the changes of the gradient along them.

Row: Ĥ_bfgs, full, matrix-free, BFGS. Liu & Nocedal, Math. Prog. 45 (1989); Schraudolph, Yu & Günter
(2007) for pairs on one batch; Byrd, Hansen, Nocedal & Singer, arXiv 1401.7020, for pairs by
Hessian products. With pairs (s, y) kept in two (m, P) windows, ρ = 1 / s.y and γ = s.y / y.y::

    s = θ_t - θ_{t-1}        y = ∇L_t(θ_t) - ∇L_t(θ_{t-1})        kept if s.y >= min_curvature |s|²
    d = H_m g,   H_i = (I - ρ s yᵀ) H_{i-1} (I - ρ y sᵀ) + ρ s sᵀ,   H_0 = γ I

Needs the objective of this batch at the last step's point: one more gradient a step. 2 m P numbers
and 4 m P operations. A non-finite gradient leaves the history alone; its own direction is not
finite.
"""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.curvature.hessian import HessianOperator
from funcprecond.curvature.objective import Objective
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.linalg import treemath
from funcprecond.linalg.bfgs import History, powell
from funcprecond.linalg.conjugate_gradients import within
from funcprecond.linalg.line_search import armijo, wolfe
from funcprecond.linalg.precision import factor_dtype
from funcprecond.methods.table import Card
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
    """L-BFGS's direction.

    Until there is a pair it is the gradient, scaled to a 1-norm of at most 1.

    Args:
        history: m, how many pairs are kept.
        pairs: where they come from: "same_batch" takes both gradients on this step's batch
            (oLBFGS), "successive" the gradients of two steps, for full batches (they need no
            further gradient, and on different batches they measure noise); "hvp" takes the
            Hessian's product with the difference of two means of iterates (SQN), each ``every``
            steps.
        curvature_fix: "powell" mixes a ``y`` with little curvature with ``s / γ`` until
            ``s.y >= 0.2 s.s / γ``, where "none" leaves the pair to ``min_curvature``.
        min_curvature: a pair with ``s.y`` below this times ``|s|²`` is not kept, which bounds γ by
            its inverse. In the loss's units.
        every: the steps from one pair to the next, with "hvp" pairs.
        line_search: "armijo" (c1 1e-4, halving; a loss a trial) or strong "wolfe" (c2 0.9; a
            gradient a trial), on this step's batch; a direction without an accepted point is 0.
            Both are for a learning rate of 1.
        trials: at most so many points on a line.

    Raises:
        ValueError: an option is out of range.
    """
    for value, valid in (
        (pairs, ("same_batch", "successive", "hvp")),
        (curvature_fix, ("none", "powell")),
        (line_search, ("none", "armijo", "wolfe")),
    ):
        if value not in valid:
            msg = f"{value!r} is not one of {', '.join(map(repr, valid))}"
            raise ValueError(msg)
    if history < 1:
        msg = f"history must be at least 1, not {history}"
        raise ValueError(msg)
    objective, operator, due = Objective(), HessianOperator(), Every("pair", every)

    def init(params: Params) -> LBFGSState:
        dtype = _dtype(params)
        return LBFGSState(
            History.init(history, _flat(params, dtype)),
            {k: p.clone() for k, p in params.items()},
            _zeros(params) if pairs == "successive" else {},
            _zeros(params) if pairs == "hvp" else {},
            counter(params),
        )

    def update(
        state: LBFGSState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[LBFGSState, Params]:
        if evidence is None:
            msg = (
                "lbfgs needs to know the parameters beside the gradient: pass fp.observe's evidence"
            )
            raise MissingEvidence(msg)
        state = take_pair(state, grads, evidence)
        dtype = state.history.steps.dtype
        g = _flat(grads, dtype)
        d = state.history.apply(g)
        first = (1 / g.abs().sum()).clamp_max(1.0)
        d = d * torch.where(state.history.filled() == 0, first, 1.0)
        direction = treemath.unravel(d, grads)
        if line_search != "none":
            direction = treemath.mul(direction, search(direction, -d.dot(g), evidence))
        return state, {k: x.to(grads[k].dtype) for k, x in direction.items()}

    def take_pair(state: LBFGSState, grads: Params, evidence: Evidence) -> LBFGSState:
        point = {k: evidence.params[k] for k in grads}
        if pairs == "same_batch":
            _, before = evidence[objective].gradient({**evidence.params, **state.point})
            s = treemath.sub(point, state.point)
            y = {k: evidence.grads[k] - before[k] for k in grads}
            return LBFGSState(pushed(state.history, s, y), point, {}, {}, state.count + 1)
        if pairs == "successive":
            s = treemath.mul(treemath.sub(point, state.point), state.count > 0)
            new = pushed(state.history, s, treemath.sub(grads, state.grads))
            return LBFGSState(new, point, grads, {}, state.count + 1)
        total, count = treemath.add(state.total, point), state.count + 1
        if due not in evidence:
            return LBFGSState(state.history, state.point, {}, total, count)
        mean = {k: (x / count).to(x.dtype) for k, x in total.items()}
        s = treemath.sub(mean, state.point)
        y = within(evidence[operator], evidence.params, list(grads))(s)
        new = pushed(state.history, s, y)
        return LBFGSState(new, mean, {}, _zeros(total), torch.zeros_like(count))

    def pushed(old: History, s: Params, y: Params) -> History:
        dtype = old.steps.dtype
        flat_s, flat_y = _flat(s, dtype), _flat(y, dtype)
        if curvature_fix == "powell":
            flat_y = powell(flat_s, flat_y, flat_s / old.gamma.to(dtype))
        return old.push(flat_s, flat_y, min_curvature=min_curvature)

    def search(direction: Params, slope: Tensor, evidence: Evidence) -> Tensor:
        functions, params = evidence[objective], evidence.params
        plain = is_eager((params, direction))

        def at(factor: Tensor) -> Params:
            return {
                **params,
                **{k: (params[k] - factor * d).to(params[k].dtype) for k, d in direction.items()},
            }

        def evaluate(factor: Tensor) -> tuple[Tensor, Tensor]:
            loss, there = functions.gradient(at(factor))
            return loss, -treemath.dot({k: there[k] for k in direction}, direction)

        options = {"trials": trials, "plain": plain}
        if line_search == "armijo":
            return armijo(lambda a: functions.loss(at(a)), evidence.loss, slope, **options)
        return wolfe(evaluate, evidence.loss, slope, **options)

    def needs(t: int) -> tuple[Need, ...]:
        wanted = (objective,) if pairs == "same_batch" or line_search != "none" else ()
        # At step 0 there is no second mean of iterates yet.
        return (*wanted, operator, *due.due(t)) if pairs == "hvp" and t and due.due(t) else wanted

    return Transform(init, update, needs)


def _flat(values: Params, dtype: torch.dtype) -> Tensor:
    return treemath.ravel({k: v.to(dtype) for k, v in values.items()})


def _dtype(params: Params) -> torch.dtype:
    widest = torch.float32
    for p in params.values():
        widest = torch.promote_types(widest, factor_dtype(p))
    return widest


def _zeros(params: Params) -> Params:
    return {k: torch.zeros_like(p) for k, p in params.items()}


CARDS = (
    Card(
        "lbfgs",
        "L-BFGS (Liu & Nocedal 1989)",
        "Ĥ_bfgs",
        "full, matrix-free",
        "G iter, BFGS",
        lbfgs,
        learning_rate=0.3,
        momentum=True,
        options={"curvature_fix": "powell"},
    ),
)
