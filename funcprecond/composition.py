"""A method from its three choices: which curvature, how it is stored, how it is solved with."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from funcprecond.curvature.gradient import BatchGradient, OuterProduct
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.linalg import treemath
from funcprecond.need import Every, Need, Turn
from funcprecond.representation.average import Decay, accumulate, check_decay
from funcprecond.representation.representation import Representation
from funcprecond.solver.solver import Solver
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["Composed", "NoRepresentation", "NoSolver", "compose"]


class NoRepresentation(TypeError):
    """A curvature was paired with a representation that cannot take its measurement in."""


class NoSolver(TypeError):
    """A solver was paired with a representation that it does not accept."""


@state
class Composed:
    """The state of a composed method.

    Attributes:
        representation: the accumulated curvature.
        factor: what the solver last prepared of it.
        mean: the running mean of the gradient, if there is momentum.
    """

    representation: Any
    factor: Any
    mean: Params


def compose(
    curvature: Need,
    representation: type[Representation],
    solver: Solver,
    *,
    decay: Decay = None,
    every: int = 1,
    refresh_every: int = 1,
    start: int = 0,
    stagger: bool = False,
    momentum: float | Tensor | None = None,
    initial: Callable[[Params], Any] | None = None,
) -> Transform:
    """Put a curvature, a representation and a solver together into a method.

    Each step that is due takes in a measurement (``every``) and prepares the solver's factor
    (``refresh_every``); every step applies the factor to the gradient of that step. Measurements
    come first, so that the current one is inside its own preconditioner.

    Args:
        curvature: what to measure, a :class:`funcprecond.Need` of :mod:`funcprecond.curvature`.
        representation: a class of :mod:`funcprecond.representation`.
        solver: an instance of a class of :mod:`funcprecond.solver`.
        decay: how measurements are carried over steps, see
            :mod:`funcprecond.representation.average`: None (local), a float (moving average, the
            weight of the old value), a :class:`funcprecond.RisingDecay` or "sum".
        every, refresh_every: the two intervals, in steps.
        start: both are due at every step before this one.
        stagger: spread a refresh over its interval, a share of the factors at each step, so that
            no step is a spike. The solver must be one that ``staggers``.
        momentum: the weight of the old value of a running mean of the gradient, to which the factor
            is applied in the gradient's place; measurements see the gradient itself. None is
            without.
        initial: makes the representation of the parameters; its own ``init`` by default.

    Returns:
        A :class:`funcprecond.Transform`, whose state is a :class:`Composed`.

    Raises:
        TypeError: one of the three parts is not what it should be.
        NoRepresentation: the representation cannot take in what the curvature measures.
        NoSolver: the solver does not accept the representation.
        ValueError: an interval or the decay is out of range, or the solver cannot stagger.

    Example:
        >>> import torch, funcprecond as fp
        >>> from funcprecond.curvature import BatchGradient
        >>> from funcprecond.representation import Diagonal
        >>> from funcprecond.solver import Divide
        >>> adagrad = fp.compose(BatchGradient(), Diagonal, Divide(1e-8, power=0.5), decay="sum")
        >>> grads = {"w": torch.tensor([3.0, -4.0])}
        >>> state, direction = adagrad.update(adagrad.init(grads), grads)
        >>> direction["w"]
        tensor([ 1., -1.])
    """
    _check(curvature, representation, solver)
    check_decay(decay)
    if stagger and not solver.staggers:
        msg = f"{type(solver).__name__} prepares all factors at once, and cannot stagger: stagger=False"
        raise ValueError(msg)
    measure, refresh = Every("measure", every, start), Every("refresh", refresh_every, start)
    turns = [Turn("refresh", refresh_every, i) for i in range(refresh_every)] if stagger else []
    from_gradient = isinstance(curvature, BatchGradient)

    def init(params: Params) -> Composed:
        rep = (initial or representation.init)(params)
        return Composed(
            rep, solver.init(rep), {} if momentum is None else treemath.zeros_like(params)
        )

    def update(
        state: Composed, grads: Params, evidence: Evidence | None = None
    ) -> tuple[Composed, Params]:
        rep, factor, mean = state.representation, state.factor, state.mean
        if evidence is None and not from_gradient:
            msg = f"this method needs {curvature} too: pass the evidence of fp.observe to update"
            raise MissingEvidence(msg)
        if evidence is None or measure in evidence:
            value = OuterProduct(grads) if from_gradient else evidence[curvature]  # pyright: ignore
            rep = rep.accumulate(value, decay)
        if evidence is None or refresh in evidence:
            factor = solver.prepare(rep, factor)
        elif turn := next((n for n in turns if n in evidence), None):
            factor = solver.prepare(rep, factor, turn)  # pyright: ignore[reportCallIssue]
        if momentum is None:
            return Composed(rep, factor, {}), solver.apply(factor, grads, evidence)
        mean = {k: accumulate(m, grads[k], momentum) for k, m in mean.items()}
        return Composed(rep, factor, mean), treemath.cast(solver.apply(factor, mean), grads)

    def needs(t: int) -> tuple[Need, ...]:
        due = measure.due(t)
        wanted = (curvature,) if due and not from_gradient else ()
        mark = refresh.due(t)
        if turns and t >= max(start, 1):
            mark = (turns[t % refresh_every],)
        return (*solver.needs, *wanted, *due, *mark)

    return Transform(init, update, needs)


def _check(curvature: Any, representation: Any, solver: Any) -> None:
    """See that the three parts are what they should be, and fit each other."""
    if not isinstance(curvature, Need):
        msg = (
            f"the curvature must be an instance of a need, such as "
            f"fp.curvature.BatchGradient(), not {curvature!r}"
        )
        raise TypeError(msg)
    if not isinstance(representation, type) or not hasattr(representation, "accumulate"):
        msg = (
            "the representation must be a class of fp.representation, such as Diagonal, not "
            f"{representation!r}"
        )
        raise TypeError(msg)
    if isinstance(solver, type) or not hasattr(solver, "prepare"):
        msg = (
            "the solver must be an instance of a class of fp.solver, such as "
            f"fp.solver.Divide(), not {solver!r}"
        )
        raise TypeError(msg)
    if not issubclass(curvature.gives, representation.accepts):
        msg = (
            f"{representation.__name__} takes in a {representation.accepts.__name__}, and "
            f"{type(curvature).__name__} gives a {curvature.gives.__name__}: choose another "
            "representation or another curvature"
        )
        raise NoRepresentation(msg)
    if representation not in solver.accepts:
        accepted = ", ".join(c.__name__ for c in solver.accepts)
        msg = (
            f"{type(solver).__name__} accepts {accepted}, not {representation.__name__}: choose "
            "another solver"
        )
        raise NoSolver(msg)
