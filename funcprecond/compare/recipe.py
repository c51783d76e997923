"""How the comparison puts a method into a training step: the one place where its rules stand."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import funcprecond as fp
from funcprecond.methods.card import CARDS
from funcprecond.transform import Transform

MOMENTUM = 0.9
# Refreshed at each of the first steps, whatever the interval: roots of the first few statistics, of
# low rank, kept for a whole interval make Shampoo and CASPR diverge at every learning rate.
WARM_UP = 20

# Every method is followed by heavy-ball momentum, as in ASDL's comparison, sgd included; but not
# where its card says that the direction carries momentum already, and not after these.
WITHOUT_MOMENTUM = {
    "adagrad": "divides by a sum over all steps; defined without momentum",
    "lbfgs": "its secant pairs assume that the step taken is its own direction",
    "hessian_free": "solves each step to the end, starting from the last solution",
}

# Made for hidden matrices: vectors, and what a network starts and ends with, go to Adam at its own
# card's learning rate, as their users do.
FOR_HIDDEN_MATRICES = ("muon",)


def builder(method: str) -> Callable[..., Transform]:
    """The function that makes the method.

    Raises:
        ValueError: the method is planned only.
    """
    build = CARDS[method].build
    if build is None:
        message = f"{method} is in the table but cannot be built yet."
        raise ValueError(message)
    return build


def momentum(method: str) -> float:
    """Momentum that the comparison puts after a method; 0 for none."""
    return 0.0 if CARDS[method].carries_momentum or method in WITHOUT_MOMENTUM else MOMENTUM


def options(method: str, interval: int | None) -> dict[str, Any]:
    """Keyword arguments for the method's builder.

    Args:
        method: name in `CARDS`.
        interval: steps between two measurements and between two preparations of the factor, as in
            ASDL's case studies; None for a method without intervals.
    """
    chosen = dict(CARDS[method].options)
    if interval is not None:
        chosen |= {"every": interval, "refresh_every": interval}
        if "start" in inspect.signature(builder(method)).parameters:
            chosen.setdefault("start", WARM_UP)
    return chosen


def recipe(
    method: str, learning_rate: float, interval: int | None, ends: Sequence[str] = ()
) -> Transform:
    """The whole transform: method, momentum where it has none of its own, learning rate.

    Args:
        method: name in `CARDS`.
        learning_rate: multiplies the direction.
        interval: see `options`.
        ends: the task's, for a method that leaves those parameters to Adam.
    """
    parts = [builder(method)(**options(method, interval))]
    if momentum(method):
        parts.append(fp.momentum(momentum(method)))
    whole = fp.chain(*parts, fp.scale(learning_rate))
    if method not in FOR_HIDDEN_MATRICES:
        return whole
    adam = fp.chain(builder("adam")(), fp.scale(CARDS["adam"].learning_rate))
    return fp.partition(fp.muon_rules(*ends), muon=whole, adam=adam)
