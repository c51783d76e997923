"""How far to go along a step: Armijo's condition, strong Wolfe, and CG backtracking.

Pure functions of a loss along a line, or of a table of losses. All candidates are tried in order
and ``where`` keeps the first that is accepted; with ``eager``, where nothing traces, the search
ends there.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.conjugate_gradients import CGResult
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
    """The first of ``1, shrink, shrink^2, ...`` with ``f(a) <= f(0) + c1 a slope``, else 0.

    Args:
        loss_at: the loss as a function of the 0-d factor ``a``.
        loss: its value at 0.
        slope: its derivative there; unless it is negative the answer is 0.
        c1, shrink, trials: how much descent is enough, the ratio of two candidates, how many.
        first: the loss at 1, if it is known.
        eager: end at the first success, by one host read for each trial.
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

    The bracket always holds such a factor: its lower end has enough descent and a steep slope, its
    upper end too little descent or a rising slope. If the trials run out, its lower end, which is 0
    if none had enough descent.

    Args:
        evaluate: (loss, derivative) as functions of the 0-d factor ``a``; 1 is tried first.
        loss, slope: the two at 0; unless the slope is negative the answer is 0.
        c1, c2, trials: how much descent, how flat, how many evaluations.
        eager: end at the first success, by one host read for each trial.
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
    # A found factor is never 0; a slope that does not descend leaves both at 0.
    return torch.where(result > 0, result, low)


def search(
    objective: Any,
    loss: Tensor,
    slope: Tensor,
    step: Params,
    *,
    rule: Literal["armijo", "wolfe"],
    trials: int = 20,
    eager: bool = False,
) -> Tensor:
    """A factor of a step, by :func:`armijo` or :func:`wolfe` with their defaults.

    Args:
        objective: :class:`funcprecond.curvature.ObjectiveFunctions`.
        loss, slope: the loss, and its derivative along the step, where the step begins.
        step: shaped like some of the parameters.
        rule, trials, eager: which rule, and its options.
    """
    options = {"trials": trials, "eager": eager}
    if rule == "armijo":
        return armijo(lambda a: objective.loss_after(treemath.mul(step, a)), loss, slope, **options)

    def evaluate(factor: Tensor) -> tuple[Tensor, Tensor]:
        value, there = objective.gradient_after(treemath.mul(step, factor))
        return value, treemath.dot({k: there[k] for k in step}, step)

    return wolfe(evaluate, loss, slope, **options)


def backtrack(
    loss_at: Callable[[int], Tensor], counts: Tensor, last: Tensor, *, eager: bool = False
) -> tuple[Tensor, Tensor]:
    """Martens' CG backtracking: from the last candidate backwards while the loss decreases.

    Args:
        loss_at: the loss of candidate ``j``.
        counts: (n,) booleans, which candidates count; the others are passed over.
        last: the loss of what comes after candidate ``n - 1``, the start of the search.
        eager: end at the first that is not better, by one host read for each candidate.

    Returns:
        The index of the best, ``n`` for the start itself, a 0-d integer; and its loss.
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
        # A loss that is not finite is worse than any, as a start too.
        better = (
            counts[j] & going & ((loss < best) | (torch.isfinite(loss) & ~torch.isfinite(best)))
        )
        best, index = torch.where(better, loss, best), torch.where(better, j, index)
        going = going & (better | ~counts[j] | ~torch.isfinite(best))
    return index, best


def best_iterate(
    loss_after: Callable[[Params], Tensor], found: CGResult, last: Tensor, *, eager: bool = False
) -> tuple[Params, Tensor]:
    """:func:`backtrack` through the stored iterates of conjugate gradients.

    Args:
        loss_after: the loss after a step.
        found: what CG returned; its stored iterates are the candidates.
        last: the loss after its solution.
        eager: see :func:`backtrack`.

    Returns:
        The chosen iterate and its loss.
    """

    def iterate(j: int) -> Params:
        return {k: s[j] for k, s in found.stored.items()}

    # The last iterate, if stored, is not its own alternative.
    counts = (found.stored_at > 0) & (found.stored_at < found.iterations)
    index, loss = backtrack(lambda j: loss_after(iterate(j)), counts, last, eager=eager)
    step = found.solution
    for j in range(counts.shape[-1]):
        step = {k: torch.where(index == j, x, step[k]) for k, x in iterate(j).items()}
    return step, loss
