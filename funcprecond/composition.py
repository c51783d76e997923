"""Methods composed of a curvature, a representation that stores it, and a solver."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from funcprecond.checks import checked
from funcprecond.curvature.gradient import BatchGradient, OuterProduct
from funcprecond.evidence import Evidence, is_due, required
from funcprecond.linalg import treemath
from funcprecond.need import Every, Need, NotDue, Turn
from funcprecond.representation.average import Decay, accumulate, check_decay
from funcprecond.representation.representation import Representation
from funcprecond.solver.solver import Solver
from funcprecond.transform import Transform, fitted, shapes_of
from funcprecond.tree import Params, state, static

__all__ = ["Composed", "NoRepresentation", "NoSolver", "compose"]


class NoRepresentation(TypeError):
    """The error for a representation that does not accept the measurement of the curvature."""


class NoSolver(TypeError):
    """The error for a solver that does not accept the representation."""


@state
class Composed:
    """The state of a composed method.

    Attributes:
        representation: the accumulated curvature.
        factor: the result of the solver's last refresh, which it applies to gradients.
        mean: the running mean of the gradient; an empty dict without momentum.
        shapes: the names and the shapes of the parameters.
    """

    representation: Any
    factor: Any
    mean: Params
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = static()


@checked
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
    """Compose a method from a curvature, a representation and a solver.

    Every ``every`` steps, the representation accumulates a new measurement of the curvature. Every
    ``refresh_every`` steps, and when a measurement has found new blocks, the solver prepares a new
    factor. Every step applies the current factor to the gradient. The measurement comes first, so
    that the preconditioner of a step includes the measurement of the same step.

    Args:
        curvature: the measurement, an instance of a :class:`funcprecond.Need` of
            :mod:`funcprecond.curvature`.
        representation: a class of :mod:`funcprecond.representation`.
        solver: an instance of a class of :mod:`funcprecond.solver`.
        decay: how measurements are carried over steps, see
            :mod:`funcprecond.representation.average`: None (only the newest), a float in [0, 1)
            (the weight of the old value in a moving average), a :class:`funcprecond.RisingDecay`,
            or "sum".
        every, refresh_every: the intervals of the measurement and of the refresh, in steps.
        start: both are also due at every step before this one.
        stagger: whether to refresh a share of the factors at each step of the interval instead of
            all factors at once, so that all steps take about the same time. The solver must support
            it (``solver.staggers``).
        momentum: the weight of the old value in a running mean of the gradient. The factor is then
            applied to this mean and not to the gradient, and measurements still use the gradient.
            With None, there is no running mean.
        initial: a function from the parameters to the initial representation; by default,
            ``representation.init``.

    Returns:
        A :class:`funcprecond.Transform`, whose state is a :class:`Composed`.

    Raises:
        TypeError: ``curvature``, ``representation`` or ``solver`` has the wrong type.
        NoRepresentation: the representation does not accept the measurement of the curvature.
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
        msg = (
            f"the solver {type(solver).__name__} prepares all factors at once, so it cannot "
            "stagger them: pass stagger=False"
        )
        raise ValueError(msg)
    measure, refresh = Every("measure", every, start), Every("refresh", refresh_every, start)
    turns = [Turn("refresh", refresh_every, i) for i in range(refresh_every)] if stagger else []
    from_gradient = isinstance(curvature, BatchGradient)
    measured = () if from_gradient else (curvature,)
    finds_blocks = hasattr(representation, "blocks")

    def init(params: Params) -> Composed:
        rep = (initial or representation.init)(params)
        mean = {} if momentum is None else treemath.zeros_like(params)
        return Composed(rep, solver.init(rep), mean, tuple(shapes_of(params).items()))

    def update(
        state: Composed, grads: Params, evidence: Evidence | None = None
    ) -> tuple[Composed, Params]:
        rep, factor, mean = state.representation, state.factor, state.mean
        if not from_gradient:
            evidence = required(evidence, curvature)
        if is_due(measure, evidence, *measured):
            value = OuterProduct(grads) if from_gradient else evidence[curvature]  # pyright: ignore
            rep = rep.accumulate(value, decay)
        has_grown = finds_blocks and rep.blocks != state.representation.blocks
        if is_due(refresh, evidence) or has_grown:
            factor = solver.prepare(rep, factor)
        elif turn := next((n for n in turns if evidence and n in evidence.measured), None):
            factor = solver.prepare(rep, factor, turn)  # pyright: ignore[reportCallIssue]
        if momentum is None:
            return Composed(rep, factor, {}, state.shapes), solver.apply(factor, grads, evidence)
        mean = {k: accumulate(m, grads[k], momentum) for k, m in mean.items()}
        return Composed(rep, factor, mean, state.shapes), treemath.cast(
            solver.apply(factor, mean), grads
        )

    def needs(t: int) -> tuple[Need, ...]:
        wanted = measured if measure.due(t) else ()
        marks = refresh.marks(t)
        if turns and t >= max(start, 1):
            marks = (NotDue(refresh), turns[t % refresh_every])
        return (*solver.needs, *wanted, *measure.marks(t), *marks)

    return fitted(Transform(init, update, needs), lambda state: dict(state.shapes))


def _check(curvature: Any, representation: Any, solver: Any) -> None:
    """Check that the three parts have the right types and fit together."""
    if not isinstance(curvature, Need):
        msg = (
            f"the curvature must be an instance of a Need, such as "
            f"fp.curvature.BatchGradient(), not {curvature!r}"
        )
        raise TypeError(msg)
    if not isinstance(representation, type) or not hasattr(representation, "accumulate"):
        msg = (
            "the representation must be a class of fp.representation, such as "
            f"fp.representation.Diagonal, not {representation!r}"
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
            f"the representation {representation.__name__} accepts measurements of type "
            f"{representation.accepts.__name__}, but the curvature {type(curvature).__name__} "
            f"gives {curvature.gives.__name__}: choose another representation or curvature"
        )
        raise NoRepresentation(msg)
    if representation not in solver.accepts:
        accepted = ", ".join(c.__name__ for c in solver.accepts)
        msg = (
            f"the solver {type(solver).__name__} accepts {accepted}, not "
            f"{representation.__name__}: choose another solver"
        )
        raise NoSolver(msg)
