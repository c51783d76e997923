"""Linear solves with an operator: directly if it has an inverse, iteratively otherwise."""

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
from funcprecond.linalg.trust_region import truncated_cg
from funcprecond.tracing import is_eager
from funcprecond.tree import Params

__all__ = ["Method", "solve"]

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
    if not operator.symmetric:
        msg = (
            f"solve() needs a symmetric operator, but this {type(operator).__name__} is or "
            "contains a product of operators: solve with one factor at a time"
        )
        raise TypeError(msg)
    undamped = isinstance(damping, float) and damping == 0.0
    damped = operator if undamped else operator + damping
    if precondition is not None:
        options["precondition"] = as_function(precondition)
    if method is None and hasattr(operator, "inverse"):
        # An exact solution meets any tolerance that the iterative methods would take.
        method = "direct"
        options = {k: v for k, v in options.items() if not _takes(k)}
    method = method or "cg"
    one_of(("direct", *ITERATIVE), method=method)
    _check_options(method, options)
    if method == "direct":
        found = _direct(operator, damped, b, damping)
    else:
        default = {"rule": "none"} if method == "cg" else {}
        found = ITERATIVE[method](damped.matvec, b, **default | options)
    solution = Solution(found.solution, found.residual, found.iterations, found.reason)
    fine = (Stop.RESIDUAL, Stop.BOUNDARY) if method == "truncated_cg" else (Stop.RESIDUAL,)
    if throw and is_eager((b, found.solution)) and int(found.reason) not in fine:
        raise NotConverged(solution, b)
    return solution


def _takes(option: str) -> list[str]:
    """The iterative methods that take an option."""
    return [name for name, f in ITERATIVE.items() if option in inspect.signature(f).parameters]


def _check_options(method: Method, options: dict[str, Any]) -> None:
    if unknown := [name for name in options if method not in _takes(name)]:
        others = [name for name in ITERATIVE if all(name in _takes(k) for k in unknown)]
        hint = f", or choose method={' or '.join(map(repr, others))}" if others else ""
        msg = f"method={method!r} does not take {', '.join(unknown)}: leave it out{hint}"
        raise TypeError(msg)


def as_function(operator: Any) -> Callable[[Params], Params]:
    """The function ``v -> C v`` of an operator; a function is returned unchanged."""
    return getattr(operator, "matvec", operator)


def _direct(operator: Any, damped: Any, b: Params, damping: float | Tensor) -> Solution:
    if not hasattr(operator, "inverse"):
        msg = (
            f"method='direct' needs an operator with an inverse() method, and "
            f"{type(operator).__name__} has none: use method='cg' or method='minres'"
        )
        raise ValueError(msg)
    x = operator.inverse(damping) @ b
    residual = treemath.sub(b, damped @ x)
    finite = torch.isfinite(treemath.norm(residual))
    zero = torch.zeros_like(finite, dtype=torch.int64)
    reason = torch.where(finite, zero + Stop.RESIDUAL.value, zero + Stop.NOT_FINITE.value)
    return Solution(x, residual, zero, reason)
