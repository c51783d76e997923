"""How far to go along a step: Armijo's condition, strong Wolfe, and CG backtracking.

Pure functions of a loss along a line, or of a table of losses. All candidates are tried in order
and ``where`` keeps the first that is accepted; with ``plain``, where nothing watches, the search
ends there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["armijo", "backtrack", "wolfe"]


def armijo(
    loss_at: Callable[[Tensor], Tensor],
    loss: Tensor,
    slope: Tensor,
    *,
    c1: float = 1e-4,
    shrink: float = 0.5,
    trials: int = 20,
    plain: bool = False,
) -> Tensor:
    """The first of ``1, shrink, shrink^2, ...`` with ``f(a) <= f(0) + c1 a slope``, else 0.

    Args:
        loss_at: the loss as a function of the 0-d factor ``a``.
        loss: its value at 0.
        slope: its derivative there; unless it is negative the answer is 0.
        c1, shrink, trials: how much descent is enough, the ratio of two candidates, how many.
        plain: end at the first success, by one host read a trial.
    """
    factor, found = torch.ones_like(loss), ~(slope < 0)
    result = torch.zeros_like(loss)
    for _ in range(trials):
        if plain and bool(found):
            break
        accepted = ~found & (loss_at(factor) <= loss + c1 * factor * slope)
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
    plain: bool = False,
) -> Tensor:
    """A factor with Armijo's condition and ``|f'(a)| <= c2 |f'(0)|``, by doubling and bisection.

    The bracket always holds such a factor: its lower end has enough descent and a steep slope, its
    upper end too little descent or a rising slope. If the trials run out, its lower end, which is 0
    if none had enough descent.

    Args:
        evaluate: (loss, derivative) as functions of the 0-d factor ``a``; 1 is tried first.
        loss, slope: the two at 0; unless the slope is negative the answer is 0.
        c1, c2, trials: how much descent, how flat, how many evaluations.
        plain: end at the first success, by one host read a trial.
    """
    low, high = torch.zeros_like(loss), torch.full_like(loss, torch.inf)
    factor, found = torch.ones_like(loss), ~(slope < 0)
    result = torch.zeros_like(loss)
    for _ in range(trials):
        if plain and bool(found):
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


def backtrack(
    loss_at: Callable[[int], Tensor], counts: Tensor, last: Tensor, *, plain: bool = False
) -> tuple[Tensor, Tensor]:
    """Martens' CG backtracking: from the last candidate backwards while the loss decreases.

    Args:
        loss_at: the loss of candidate ``j``.
        counts: (n,) booleans, which candidates count; the others are passed over.
        last: the loss of what comes after candidate ``n - 1``, the start of the search.
        plain: end at the first that is not better, by one host read a candidate.

    Returns:
        The index of the best, ``n`` for the start itself, a 0-d integer; and its loss.
    """
    n = counts.shape[-1]
    best, index = last, torch.full_like(last, n, dtype=torch.int64)
    going = torch.ones_like(last, dtype=torch.bool)
    for j in reversed(range(n)):
        if plain and not bool(going):
            break
        if plain and not bool(counts[j]):
            continue
        loss = loss_at(j)
        # A loss that is not finite is worse than any, as a start too.
        better = (
            counts[j] & going & ((loss < best) | (torch.isfinite(loss) & ~torch.isfinite(best)))
        )
        best, index = torch.where(better, loss, best), torch.where(better, j, index)
        going = going & (better | ~counts[j] | ~torch.isfinite(best))
    return index, best
