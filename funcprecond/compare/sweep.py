"""Learning-rate sweep: half decades around the method's own, further where the best is last."""

from collections.abc import Mapping
from typing import Any

EXTENSIONS = 2  # further rates tried where the best one so far lies at the edge


def rate(centre: float, exponent: int) -> float:
    """The `exponent`-th rate of the sweep: centre times 10^(exponent/2), to three digits."""
    return float(f"{centre * 10 ** (exponent / 2):.3g}")


def validation_loss(result: Mapping[str, Any]) -> float | None:
    """What a run is chosen by, in nats; None if it did not end well.

    Not the accuracy: on a small split it moves in large steps, and many rates share one.
    """
    return result["validation"]["loss"] if result["status"] == "ok" else None


def best(results: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Exponent of the best run, or None if none ended well."""
    losses = {exponent: validation_loss(result) for exponent, result in results.items()}
    good = {exponent: loss for exponent, loss in losses.items() if loss is not None}
    return min(good, key=lambda exponent: good[exponent]) if good else None


def next_exponent(results: Mapping[int, Mapping[str, Any]], points: int) -> int | None:
    """Which rate to run next, or None when the sweep is over.

    Args:
        results: finished runs by exponent.
        points: odd number of rates before any extension; 1 means the method's own rate only.
    """
    half = points // 2
    for exponent in sorted(range(-half, half + 1), key=abs):
        if exponent not in results:
            return exponent
    if points == 1 or len(results) >= points + EXTENSIONS:
        return None
    low, high = min(results), max(results)
    winner = best(results)
    if winner is None or winner == low:  # everything diverged, or smaller was better
        return low - 1
    return high + 1 if winner == high else None
