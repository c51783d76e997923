"""The rules by which the comparison builds a training step from a method."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import funcprecond as fp
from funcprecond.methods.card import CARDS
from funcprecond.transform import Transform

MOMENTUM = 0.9
# In this many first steps, the curvature is refreshed at every step, whatever the interval. The
# first statistics have low rank, and if their roots are kept for a whole interval, Shampoo and
# CASPR diverge at every learning rate.
WARM_UP = 20

# As in the comparison of ASDL, every method including sgd is followed by heavy-ball momentum. The
# exceptions are the methods whose directions contain momentum (see their cards), and these.
WITHOUT_MOMENTUM = {
    "adagrad": "divides by a sum over all steps, and is defined without momentum",
    "lbfgs": "assumes in its secant pairs that each step is its own direction",
    "hessian_free": "solves for each step to convergence, starting from the previous solution",
}

# These methods are made for hidden matrices. As is usual, all vectors, and the first and last
# layers of a network, are trained by Adam with the learning rate of its card.
FOR_HIDDEN_MATRICES = ("muon",)


def builder(method: str) -> Callable[..., Transform]:
    """The builder of a method.

    Raises:
        ValueError: the method is planned, but not implemented.
    """
    build = CARDS[method].build
    if build is None:
        message = f"{method} is planned and cannot be built yet; choose from list-methods."
        raise ValueError(message)
    return build


def momentum(method: str) -> float:
    """The momentum that the comparison chains after a method; 0 for none."""
    return 0.0 if CARDS[method].carries_momentum or method in WITHOUT_MOMENTUM else MOMENTUM


def options(method: str, interval: int | None) -> dict[str, Any]:
    """The keyword arguments for the builder of a method.

    Args:
        method: a name in `CARDS`.
        interval: the number of steps between two measurements of the curvature, and between two
            preparations of the solver's factor, as in the case studies of ASDL; None for a method
            without intervals.
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
    """The chain of a method, momentum (unless the method is an exception) and a learning rate.

    Args:
        method: a name in `CARDS`.
        learning_rate: the factor of the direction.
        interval: see `options`.
        ends: patterns of the parameters of the first and last layers, see `Task`.
    """
    parts = [builder(method)(**options(method, interval))]
    if momentum(method):
        parts.append(fp.momentum(momentum(method)))
    whole = fp.chain(*parts, fp.scale(learning_rate))
    if method not in FOR_HIDDEN_MATRICES:
        return whole
    adam = fp.chain(builder("adam")(), fp.scale(CARDS["adam"].learning_rate))
    return fp.partition(fp.muon_rules(*ends), muon=whole, adam=adam)
