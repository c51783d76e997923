"""The result of an iterative solver, the reasons why it stops, and the error for a failed solve."""

import enum
from collections.abc import Callable

from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.tree import Params, state

__all__ = ["Matvec", "NotConverged", "Solution", "Stop"]

Matvec = Callable[[Params], Params]


class Stop(enum.IntEnum):
    """The reason why an iteration ended."""

    MAX_ITERATIONS = 0
    """The iterations reached ``max_iter``."""
    RESIDUAL = 1
    """The norm of the residual, computed by a product, is at most ``tol`` times that of ``b``."""
    STALLED = 2
    """The residual cannot become smaller, for rounding errors or because the system has no solution
    (MINRES). CG: also if the quadratic model improves too slowly."""
    NOT_POSITIVE = 3
    """CG: ``p^T B p <= 0`` for a search direction p. MINRES: ``r^T M^-1 r < 0``."""
    NOT_FINITE = 4
    """A product or the right-hand side has a NaN or an inf; the last finite iterate is returned."""
    BOUNDARY = 5
    """The solution is on the boundary of the trust region."""
    DIVERGED = 6
    """The norm of the residual exceeded a million times that of the right-hand side."""


@state
class Solution:
    """The result of an iterative solver.

    Attributes:
        solution: the last iterate, shaped like ``b``.
        residual: ``b - B x`` at the last iterate.
        iterations: the number of iterations that changed the iterate, a 0-d integer tensor.
        reason: the :class:`Stop` value, a 0-d integer tensor.
    """

    solution: Params
    residual: Params
    iterations: Tensor
    reason: Tensor


class NotConverged(RuntimeError):
    """An iterative solver ended before its residual was small enough.

    Args:
        result: the solver's last iterate, residual, number of iterations and stop reason; it is
            kept as the attribute ``result``.
        b: the right-hand side.
    """

    def __init__(self, result: Solution, b: Params):
        self.result = result
        lengths = (treemath.wide_dot(v, v).sqrt() for v in (result.residual, b))
        size = float(next(lengths) / next(lengths))
        super().__init__(
            f"the solver stopped after {int(result.iterations)} iterations with the reason "
            f"{Stop(int(result.reason)).name} and a relative residual of {size:.2g}: raise "
            "max_iter, damping or tol, pass precondition=, or pass throw=False to accept the result"
        )
