"""Linear solves with an operator: directly if it has an inverse, iteratively otherwise."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.linalg import treemath
from funcprecond.linalg.conjugate_gradients import cg
from funcprecond.linalg.minimal_residual import minres
from funcprecond.linalg.neumann_series import neumann
from funcprecond.linalg.solution import NotConverged, Solution, Stop
from funcprecond.linalg.true_residuals import unit
from funcprecond.linalg.trust_region import truncated_cg
from funcprecond.tracing import is_eager
from funcprecond.tree import Params

__all__ = ["Method", "require_symmetric", "solve"]

Method = Literal["direct", "cg", "minres", "truncated_cg", "neumann"]
ITERATIVE = {"cg": cg, "minres": minres, "truncated_cg": truncated_cg, "neumann": neumann}


def solve(
    operator: Any,
    b: Params,
    *,
    damping: float | Tensor = 0.0,
    method: Method | None = None,
    precondition: Any = None,
    throw: bool = True,
    **options: Any,
) -> Solution:
    """``(C + damping I)^-1 b``; see :meth:`funcprecond.Operator.solve`."""
    require_symmetric(operator, "solve()", "solve with one factor at a time")
    undamped = isinstance(damping, float) and damping == 0.0
    damped = operator if undamped else operator + damping
    if precondition is not None:
        options["precondition"] = as_function(precondition)
    if method is None and hasattr(operator, "inverse"):
        # An exact solution meets any tolerance that the iterative methods would take.
        method = "direct"
        options = {k: v for k, v in options.items() if k == "tol" or not _takes(k)}
    method = method or "cg"
    one_of(("direct", *ITERATIVE), method=method)
    _check_options(method, options)
    if method == "direct":
        found = _direct(operator, damped, b, damping, **options)
    else:
        default = {"rule": "none"} if method == "cg" else {}
        found = ITERATIVE[method](damped.matvec, b, **default | options)
    solution = Solution(found.solution, found.residual, found.iterations, found.reason)
    fine = (Stop.RESIDUAL, Stop.BOUNDARY) if method == "truncated_cg" else (Stop.RESIDUAL,)
    if is_eager((b, found.solution)) and int(found.reason) not in fine:
        if method == "cg":
            # The recursion's residual was not checked, because it is not small.
            residual = treemath.sub(b, damped.matvec(found.solution))
            solution = dataclasses.replace(solution, residual=residual)
        if throw:
            raise NotConverged(solution, b)
    return solution


def require_symmetric(operator: Any, caller: str, instead: str) -> None:
    """Raise TypeError unless an operator is symmetric.

    Args:
        operator: the operator.
        caller: the name of what needs it, for the message.
        instead: what the user can do.

    Raises:
        TypeError: it is, or contains, a product of operators.
    """
    if not operator.symmetric:
        msg = (
            f"{caller} needs a symmetric operator, but this {type(operator).__name__} is or "
            f"contains a product of operators: {instead}"
        )
        raise TypeError(msg)


def _takes(option: str) -> list[str]:
    """The iterative methods that take an option."""
    return [name for name, f in ITERATIVE.items() if option in inspect.signature(f).parameters]


def _check_options(method: Method, options: dict[str, Any]) -> None:
    direct = ("tol",) if method == "direct" else ()
    if unknown := [k for k in options if method not in _takes(k) and k not in direct]:
        others = [name for name in ITERATIVE if all(name in _takes(k) for k in unknown)]
        hint = f", or choose method={' or '.join(map(repr, others))}" if others else ""
        msg = f"method={method!r} does not take {', '.join(unknown)}: leave it out{hint}"
        raise TypeError(msg)


def as_function(operator: Any) -> Callable[[Params], Params]:
    """The function ``v -> C v`` of an operator; a function is returned unchanged."""
    return getattr(operator, "matvec", operator)


def _direct(
    operator: Any, damped: Any, b: Params, damping: float | Tensor, tol: float | Tensor = 1e-5
) -> Solution:
    """Apply the inverse, and once more to the residual if this is not within the tolerance."""
    if not hasattr(operator, "inverse"):
        msg = (
            f"method='direct' needs an operator with an inverse() method, and "
            f"{type(operator).__name__} has none: use method='cg' or method='minres'"
        )
        raise ValueError(msg)
    one = unit(b)
    b = treemath.mul(b, 1 / one)
    inverse, limit = operator.inverse(damping), tol * treemath.norm(b)
    x = inverse @ b
    residual = treemath.sub(b, damped @ x)
    zero = torch.zeros_like(limit, dtype=torch.int64)
    size = treemath.norm(residual)
    if is_eager((b, x)) and bool(size > limit):
        # Rounding errors of the inverse are removed by a step of iterative refinement.
        better = treemath.add(x, inverse @ residual)
        left = treemath.sub(b, damped @ better)
        if bool(treemath.norm(left) < size):
            x, residual, size = better, left, treemath.norm(left)
    reason = torch.where(size <= limit, zero + Stop.RESIDUAL.value, zero + Stop.STALLED.value)
    reason = torch.where(torch.isfinite(size), reason, Stop.NOT_FINITE.value)
    return Solution(treemath.mul(x, one), treemath.mul(residual, one), zero, reason)
