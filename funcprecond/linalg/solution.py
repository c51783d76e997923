"""What iterative solvers return, why they ended, and the error for a solve that did not succeed."""

import enum
from collections.abc import Callable

from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.tree import Params, state

__all__ = ["Matvec", "NotConverged", "Solution", "Stop"]

Matvec = Callable[[Params], Params]


class Stop(enum.IntEnum):
    """Why the iteration ended."""

    MAX_ITERATIONS = 0
    RESIDUAL = 1
    """The residual fell to ``tol`` times the right-hand side."""
    STALLED = 2
    """The quadratic model improves too slowly, by Martens' rule."""
    NOT_POSITIVE = 3
    """``p^T B p <= 0``: the matrix is not positive definite along a search direction."""
    NOT_FINITE = 4
    """A product or the right-hand side has a NaN or an inf; the solution is the last finite one."""
    BOUNDARY = 5
    """The solution is on the boundary of the trust region."""
    DIVERGED = 6
    """The residual grew beyond the right-hand side."""


@state
class Solution:
    """What an iterative solver returns.

    Attributes:
        solution: the last iterate, shaped like ``b``.
        residual: ``b - B x`` there.
        iterations: a 0-d integer.
        reason: a :class:`Stop`, as a 0-d integer.
    """

    solution: Params
    residual: Params
    iterations: Tensor
    reason: Tensor


class NotConverged(RuntimeError):
    """A solver ended before the residual was small enough; ``result`` is what it had.

    Args:
        result: the solver's last iterate, residual, iterations and reason.
        b: the right-hand side.
    """

    def __init__(self, result: Solution, b: Params):
        self.result = result
        size = float(treemath.norm(result.residual) / treemath.norm(b))
        super().__init__(
            f"the solve ended after {int(result.iterations)} iterations with "
            f"{Stop(int(result.reason)).name} and a relative residual of {size:.2g}: raise "
            "max_iter, damping or tol, pass precondition=, or take the result with throw=False"
        )
