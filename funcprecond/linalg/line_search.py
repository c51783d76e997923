"""The factor of a step: Armijo's condition, the strong Wolfe conditions, and CG backtracking.

These are pure functions of a loss along a line, or of the losses of a list of candidates. All
candidates are tried in order, and ``where`` keeps the first one that is accepted. With ``eager``,
for code that nothing traces, the search ends at that candidate.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.conjugate_gradients import CGResult
from funcprecond.tracing import is_eager
from funcprecond.tree import Params

__all__ = ["armijo", "backtrack", "best_iterate", "search", "wolfe"]


def armijo(
    loss_at: Callable[[Tensor], Tensor],
    loss: Tensor,
    slope: Tensor,
    *,
    c1: float = 1e-4,
    shrink: float = 0.5,
    trials: int = 20,
    first: Tensor | None = None,
    eager: bool = False,
) -> Tensor:
    """The first factor of ``1, shrink, shrink^2, ...`` with ``f(a) <= f(0) + c1 a f'(0)``, or 0.

    Args:
        loss_at: the loss f as a function of the factor ``a``, 0-d.
        loss: f(0).
        slope: f'(0). The result is 0 unless it is negative.
        c1: the required share of the descent that the slope predicts.
        shrink: the ratio of successive candidates.
        trials: the number of candidates.
        first: f(1), if it is known.
        eager: end the search at the first success, at the cost of one host read per trial.
    """
    factor, found = torch.ones_like(loss), ~(slope < 0)
    result = torch.zeros_like(loss)
    for i in range(trials):
        if eager and bool(found):
            break
        value = loss_at(factor) if i or first is None else first
        accepted = ~found & (value <= loss + c1 * factor * slope)
        result = torch.where(accepted, factor, result)
        found = found | accepted
        factor = factor * shrink
    return result


def wolfe(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    loss: Tensor,
    slope: Tensor,
    *,
    c1: float = 1e-4,
    c2: float = 0.9,
    trials: int = 20,
    eager: bool = False,
) -> Tensor:
    """A factor with Armijo's condition and ``|f'(a)| <= c2 |f'(0)|``, by doubling and bisection.

    The bracket always contains such a factor: its lower end has enough descent and a steep slope,
    its upper end has too little descent or a rising slope. If no trial succeeds, the result is the
    lower end, which starts at 0.

    Args:
        evaluate: the loss f and its derivative as functions of the factor ``a``, 0-d. The first
            trial is 1.
        loss, slope: f(0) and f'(0). The result is 0 unless the slope is negative.
        c1: the required share of the descent that the slope predicts.
        c2: the largest allowed ratio of the slopes.
        trials: the maximum number of evaluations.
        eager: end the search at the first success, at the cost of one host read per trial.
    """
    low, high = torch.zeros_like(loss), torch.full_like(loss, torch.inf)
    factor, found = torch.ones_like(loss), ~(slope < 0)
    result = torch.zeros_like(loss)
    for _ in range(trials):
        if eager and bool(found):
            break
        value, derivative = evaluate(factor)
        descends = value <= loss + c1 * factor * slope
        steep, rising = derivative < c2 * slope, derivative > -c2 * slope
        accepted = ~found & descends & ~steep & ~rising
        result = torch.where(accepted, factor, result)
        longer = descends & steep
        low = torch.where(~found & longer, factor, low)
        high = torch.where(~found & ~longer, factor, high)
        found = found | accepted
        factor = torch.where(torch.isinf(high), 2 * factor, (low + high) / 2)
    # An accepted factor is never 0. With a slope that is not negative, both are 0.
    return torch.where(result > 0, result, low)


def search(
    objective: Any,
    loss: Tensor,
    slope: Tensor,
    direction: Params,
    *,
    rule: Literal["armijo", "wolfe"],
    trials: int = 20,
) -> Params:
    """Scale a direction by a line search along the step ``-direction``.

    Args:
        objective: the :class:`funcprecond.curvature.ObjectiveFunctions` of the batch.
        loss, slope: the loss, and its derivative along the step, at the start of the step.
        direction: shaped like all parameters or some of them.
        rule: "armijo" or "wolfe", for :func:`armijo` or :func:`wolfe` with their default constants.
        trials: the maximum number of trials.

    Returns:
        The direction times the factor that was found.
    """
    step = treemath.mul(direction, -1.0)
    options = {"trials": trials, "eager": is_eager((loss, direction))}

    def evaluate(factor: Tensor) -> tuple[Tensor, Tensor]:
        value, there = objective.gradient_after(treemath.mul(step, factor))
        return value, treemath.dot({k: there[k] for k in step}, step)

    if rule == "wolfe":
        return treemath.mul(direction, wolfe(evaluate, loss, slope, **options))

    def loss_at(factor: Tensor) -> Tensor:
        return objective.loss_after(treemath.mul(step, factor))

    return treemath.mul(direction, armijo(loss_at, loss, slope, **options))


def backtrack(
    loss_at: Callable[[int], Tensor], counts: Tensor, last: Tensor, *, eager: bool = False
) -> tuple[Tensor, Tensor]:
    """Martens' CG backtracking: go from the last candidate backwards while the loss decreases.

    Args:
        loss_at: the loss of candidate ``j``.
        counts: (n,) booleans. A candidate for which this is False is skipped.
        last: the loss at the start of the search, which comes after candidate ``n - 1``.
        eager: end the search at the first candidate that is not better, at the cost of one host
            read per candidate.

    Returns:
        The index of the best candidate, or ``n`` for the start itself, as a 0-d integer tensor; and
        the loss there.
    """
    n = counts.shape[-1]
    best, index = last, torch.full_like(last, n, dtype=torch.int64)
    going = torch.ones_like(last, dtype=torch.bool)
    for j in reversed(range(n)):
        if eager and not bool(going):
            break
        if eager and not bool(counts[j]):
            continue
        loss = loss_at(j)
        # A loss that is not finite is worse than any other, also at the start.
        better = (
            counts[j] & going & ((loss < best) | (torch.isfinite(loss) & ~torch.isfinite(best)))
        )
        best, index = torch.where(better, loss, best), torch.where(better, j, index)
        going = going & (better | ~counts[j] | ~torch.isfinite(best))
    return index, best


def best_iterate(
    loss_after: Callable[[Params], Tensor], found: CGResult, last: Tensor, *, eager: bool = False
) -> tuple[Params, Tensor]:
    """:func:`backtrack` over the stored iterates of conjugate gradients.

    Args:
        loss_after: the loss after a step.
        found: the result of CG. The candidates are its stored iterates.
        last: the loss after the step ``found.solution``, where the search starts.
        eager: see :func:`backtrack`.

    Returns:
        The best iterate and its loss.
    """

    def iterate(j: int) -> Params:
        return {k: s[j] for k, s in found.stored.items()}

    # The last iterate, where the search starts, is not a candidate even if it is stored.
    counts = (found.stored_at > 0) & (found.stored_at < found.iterations)
    index, loss = backtrack(lambda j: loss_after(iterate(j)), counts, last, eager=eager)
    step = found.solution
    for j in range(counts.shape[-1]):
        step = {k: torch.where(index == j, x, step[k]) for k, x in iterate(j).items()}
    return step, loss
