"""A method from its three choices: which curvature, how it is stored, how it is solved with."""

from collections.abc import Callable
from typing import Any

from funcprecond.curvature.gradient import BatchGradient, OuterProduct
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.need import Every, Need, Turn
from funcprecond.representation.average import Decay, check_decay
from funcprecond.solver.layer_gradient import gradient_rows
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["Composed", "NoSolver", "compose"]


class NoSolver(TypeError):
    """A solver was paired with a representation that it does not accept."""


@state
class Composed:
    """The state of a composed method.

    Attributes:
        representation: the accumulated curvature.
        factor: what the solver last prepared of it.
    """

    representation: Any
    factor: Any


def compose(
    curvature: Need,
    representation: Any,
    solver: Any,
    *,
    decay: Decay = None,
    every: int = 1,
    refresh_every: int = 1,
    start: int = 0,
    stagger: bool = False,
    initial: Callable[[Params], Any] | None = None,
) -> Transform:
    """Put a curvature, a representation and a solver together.

    Each step that is due accumulates a measurement (``every``) and prepares the solver's factor
    (``refresh_every``); every step applies the factor to the gradient of that step. Statistics come
    first, so the current measurement is inside its own preconditioner.

    Args:
        curvature: what to measure, a :class:`funcprecond.Need`.
        representation: a class of :mod:`funcprecond.representation`.
        solver: an instance of a class of :mod:`funcprecond.solver`.
        decay: how measurements are carried: None (local), a float (EMA, the weight of the old
            value) or "sum".
        every, refresh_every: the two intervals, in steps.
        start: both are due at every step before this one.
        stagger: spread a refresh over its interval, a share of the factors at each step, so that
            no step is a spike. The solver must know how to take turns.
        initial: makes the representation of the parameters; its own ``init`` by default.

    Raises:
        NoSolver: the solver does not accept the representation.
        ValueError: an interval or the decay is out of range.
    """
    if representation not in solver.accepts:
        accepted = ", ".join(c.__name__ for c in solver.accepts)
        name = type(solver).__name__
        msg = f"{name} accepts {accepted}, not {representation.__name__}: choose another solver"
        raise NoSolver(msg)
    check_decay(decay)
    measure, refresh = Every("measure", every, start), Every("refresh", refresh_every, start)
    turns = [Turn("refresh", refresh_every, i) for i in range(refresh_every)] if stagger else []
    from_gradient = isinstance(curvature, BatchGradient)
    # A solver that can use the gradient's own rows says so by the need that measures them.
    rows: Need | None = getattr(solver, "rows", None)

    def init(params: Params) -> Composed:
        rep = (initial or representation.init)(params)
        return Composed(rep, solver.init(rep))

    def update(
        state: Composed, grads: Params, evidence: Evidence | None = None
    ) -> tuple[Composed, Params]:
        rep, factor = state.representation, state.factor
        if evidence is None and not from_gradient:
            msg = f"this method needs {curvature} too: pass the evidence of fp.observe to update"
            raise MissingEvidence(msg)
        if evidence is None or measure in evidence:
            value = OuterProduct(grads) if from_gradient else evidence[curvature]  # pyright: ignore
            rep = rep.accumulate(value, decay)
        if evidence is None or refresh in evidence:
            factor = solver.prepare(rep, factor)
        elif turn := next((n for n in turns if n in evidence), None):
            factor = solver.prepare(rep, factor, turn)
        if rows is None:
            return Composed(rep, factor), solver.apply(factor, grads)
        return Composed(rep, factor), solver.apply(factor, grads, gradient_rows(grads, evidence))

    def needs(t: int) -> tuple[Need, ...]:
        due = measure.due(t)
        wanted = (curvature,) if due and not from_gradient else ()
        mark = refresh.due(t)
        if turns and t >= max(start, 1):
            mark = (turns[t % refresh_every],)
        return (*(() if rows is None else (rows,)), *wanted, *due, *mark)

    return Transform(init, update, needs)
