"""The sweep of learning rates in half decades around the method's own learning rate.

If the best rate is the smallest or the largest one, the sweep continues beyond it.
"""

from collections.abc import Mapping
from typing import Any

EXTENSIONS = 2  # the maximal number of rates beyond the initial ones


def rate(center: float, exponent: int) -> float:
    """The rate `center * 10^(exponent / 2)` of the sweep, rounded to three digits."""
    return float(f"{center * 10 ** (exponent / 2):.3g}")


def validation_loss(result: Mapping[str, Any]) -> float | None:
    """The validation loss, by which the best run is chosen, in nats; None if the run failed.

    The accuracy is not used, because it takes few values on a small split, so that many learning
    rates would be equally good.
    """
    return result["validation"]["loss"] if result["status"] == "ok" else None


def best(results: Mapping[int, Mapping[str, Any]]) -> int | None:
    """The exponent of the best run, or None if all runs failed."""
    losses = {exponent: validation_loss(result) for exponent, result in results.items()}
    good = {exponent: loss for exponent, loss in losses.items() if loss is not None}
    return min(good, key=lambda exponent: good[exponent]) if good else None


def next_exponent(results: Mapping[int, Mapping[str, Any]], points: int) -> int | None:
    """The exponent of the learning rate to run next, or None if the sweep is complete.

    Args:
        results: the finished runs by exponent.
        points: the odd number of initial rates; 1 stands for the method's own rate only, without
            any extension.
    """
    half = points // 2
    for exponent in sorted(range(-half, half + 1), key=abs):
        if exponent not in results:
            return exponent
    if points == 1 or len(results) >= points + EXTENSIONS:
        return None
    low, high = min(results), max(results)
    winner = best(results)
    if winner is None or winner == low:  # all runs failed, or the smallest rate is the best
        return low - 1
    return high + 1 if winner == high else None
