"""The type of every method, and of everything that is chained with a method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.need import Need
from funcprecond.tree import Params

__all__ = ["Transform", "apply", "chain", "counter", "gradient_only", "stateless"]


class Transform(NamedTuple):
    """Three pure functions that turn gradients into directions.

    Attributes:
        init: a function ``params -> state``. A state is a tree of tensors.
        update: a function ``(state, grads, evidence=None) -> (new state, direction)``. The
            direction has the dtypes of the gradient, and it is subtracted from the parameters, as a
            gradient is. A method that needs only the gradient also works without evidence; it then
            measures and refreshes at every call.
        needs: a function ``t -> needs``: the needs to observe at step ``t``, a Python integer that
            counts from 0.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt = fp.momentum(0.5)
        >>> grads = {"w": torch.ones(2)}
        >>> state = opt.init(grads)
        >>> for _ in range(2):
        ...     state, direction = opt.update(state, grads)
        >>> direction["w"]
        tensor([1.5000, 1.5000])
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Any, Params]]
    needs: Callable[[int], tuple[Need, ...]] = lambda t: ()


def gradient_only(init: Callable, update: Callable) -> Transform:
    """Make a transform from an ``update(state, grads)`` that takes only the gradient."""
    return Transform(init, lambda state, grads, evidence=None: update(state, grads))


def stateless(function: Callable[[Params], Params]) -> Transform:
    """Make a transform without a state from a function of the gradient."""
    return gradient_only(lambda params: (), lambda state, grads: (state, function(grads)))


def chain(*transforms: Transform) -> Transform:
    """Apply transforms one after another: the direction of one is the gradient of the next.

    The order matters. ``chain(adam(), weight_decay(0.1), scale(1e-3))`` decays the weights
    themselves (decoupled weight decay, as in AdamW), and ``chain(weight_decay(0.1), adam(),
    scale(1e-3))`` adds the decay to the gradient that Adam receives (an L2 penalty). The learning
    rate comes last.

    Args:
        *transforms: the transforms, in the order in which they are applied.

    Returns:
        A :class:`Transform`. Its state is the tuple of the states of ``transforms``, and its needs
        are all of their needs.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt = fp.chain(fp.momentum(0.9), fp.scale(0.5))
        >>> grads = {"w": torch.tensor([1.0, -2.0])}
        >>> state, direction = opt.update(opt.init(grads), grads)
        >>> direction["w"]
        tensor([ 0.5000, -1.0000])
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
    """Compute the new parameters ``params - rate * direction``.

    Args:
        params, direction: the parameters and the direction, with the same names.
        rate: the learning rate. With the rate here, no :func:`funcprecond.scale` is needed, which
            saves one pass over memory.

    Returns:
        New tensors, with the dtypes of ``params``.

    Raises:
        KeyError: a parameter has no entry in the direction.

    Example:
        >>> import torch, funcprecond as fp
        >>> fp.apply({"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}, rate=0.5)
        {'w': tensor([-1.])}
    """
    missing = params.keys() - direction.keys()
    if missing:
        msg = f"the direction has no entry for {sorted(missing)}: it must contain every parameter"
        raise KeyError(msg)
    return treemath.add(params, treemath.cast(direction, params), -rate)


def counter(like: Params) -> Tensor:
    """Make a step counter, a 0-d integer tensor with the value 0 on the parameters' device."""
    first = next(iter(like.values()), torch.zeros(()))
    return first.new_zeros((), dtype=torch.int64)
