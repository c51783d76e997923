"""The one type of every method and of everything that is chained around it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.need import Need
from funcprecond.tree import Params

__all__ = ["Transform", "apply", "chain", "counter", "gradient_only", "stateless"]


class Transform(NamedTuple):
    """Turns gradients into directions, by three pure functions.

    Attributes:
        init: ``params -> state``. A state is a tree of tensors.
        update: ``(state, grads, evidence=None) -> (new state, direction)``. A direction has the
            sign and the dtypes of the gradient. Methods that need the gradient only work without
            evidence, and then measure and refresh at every call.
        needs: ``t -> needs``: what to observe at step ``t``, a host integer counted from 0.
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Any, Params]]
    needs: Callable[[int], tuple[Need, ...]] = lambda t: ()


def gradient_only(init: Callable, update: Callable) -> Transform:
    """A transform whose ``update(state, grads)`` asks for nothing beside the gradient."""
    return Transform(init, lambda state, grads, evidence=None: update(state, grads))


def stateless(function: Callable[[Params], Params]) -> Transform:
    """A transform that maps each gradient on its own."""
    return gradient_only(lambda params: (), lambda state, grads: (state, function(grads)))


def chain(*transforms: Transform) -> Transform:
    """Apply transforms one after another: the direction of one is the gradient of the next.

    The order carries meaning. ``chain(adam(), weight_decay(0.1), scale(1e-3))`` decays the weights
    themselves (decoupled, AdamW); ``chain(weight_decay(0.1), adam(), scale(1e-3))`` adds the decay
    to the gradient that Adam sees (an L2 penalty). The learning rate comes last.
    """

    def init(params):
        return tuple(t.init(params) for t in transforms)

    def update(state, grads, evidence=None):
        new = []
        for transform, old in zip(transforms, state, strict=True):
            inner, grads = transform.update(old, grads, evidence)
            new.append(inner)
        return tuple(new), grads

    def needs(t):
        return tuple(dict.fromkeys(n for transform in transforms for n in transform.needs(t)))

    return Transform(init, update, needs)


def apply(params: Params, direction: Params, rate: float | Tensor = 1.0) -> Params:
    """``params - rate * direction``, as new tensors of the parameters' dtypes.

    Args:
        params, direction: with the same names.
        rate: a learning rate; here it saves the pass over memory that :func:`funcprecond.scale`
            takes.

    Raises:
        KeyError: the direction lacks a parameter.
    """
    missing = params.keys() - direction.keys()
    if missing:
        msg = f"the direction has no entry for {sorted(missing)}"
        raise KeyError(msg)
    return treemath.add(params, treemath.cast(direction, params), -rate)


def counter(like: Params) -> Tensor:
    """A step counter at zero: a 0-d integer tensor on the parameters' device."""
    first = next(iter(like.values()), torch.zeros(()))
    return first.new_zeros((), dtype=torch.int64)
