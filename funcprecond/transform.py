"""The type of every method, and of everything that is chained with a method."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcprecond.checks import listed
from funcprecond.linalg import treemath
from funcprecond.need import Need
from funcprecond.tree import Params

__all__ = [
    "Transform",
    "apply",
    "chain",
    "check_fit",
    "check_present",
    "counter",
    "fitted",
    "gradient_only",
    "shapes_of",
    "stateless",
]


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


def fitted(transform: Transform, covered: Callable[[Any], Mapping[str, Any]]) -> Transform:
    """Make a transform compare the gradient with its state before it does any work.

    Args:
        transform: the transform.
        covered: a function of the state that returns tensors shaped like the parameters, or their
            shapes, by name.

    Returns:
        The transform. Its ``update`` raises ValueError, with the names, if the state is that of
        other parameters.
    """

    def update(state: Any, grads: Params, evidence: Any = None) -> tuple[Any, Params]:
        check_fit(shapes_of(covered(state)), grads)
        return transform.update(state, grads, evidence)

    return Transform(transform.init, update, transform.needs)


def shapes_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of tensors by name; values that are shapes already are kept."""
    return {k: x.shape if isinstance(x, Tensor) else x for k, x in params.items()}


def check_fit(shapes: dict[str, Any], grads: Params) -> None:
    """Raise ValueError unless a gradient has the names and the shapes of a state's parameters."""
    given = shapes_of(grads)
    if shapes == given:
        return
    check_present(grads)
    missing, unknown = sorted(given.keys() - shapes.keys()), sorted(shapes.keys() - given.keys())
    differing = [
        f"{k}: {tuple(shapes[k])}, not {tuple(x)}"
        for k, x in given.items()
        if k in shapes and tuple(shapes[k]) != tuple(x)
    ]
    faults = [f"it has no entry for {listed(missing)}"] if missing else []
    faults += [f"it has entries for {listed(unknown)}, which the gradient lacks"] if unknown else []
    faults += (
        [f"it has other shapes than the gradient for {listed(differing)}"] if differing else []
    )
    msg = (
        f"the state does not fit the gradient: {'; '.join(faults)}. A state belongs to the "
        "parameters that opt.init was called with: where these have changed, pass the gradient of "
        "the old ones, or make a new state with opt.init(params)"
    )
    raise ValueError(msg)


def check_present(grads: Params) -> None:
    """Raise ValueError if a gradient is None, as ``.grad`` of what the loss does not depend on."""
    if none := sorted(k for k, x in grads.items() if x is None):
        msg = (
            f"the gradient of {listed(none)} is None, as that of a parameter that the loss does "
            "not depend on: pass zeros, torch.zeros_like(param), or call opt.init and opt.update "
            "without it"
        )
        raise ValueError(msg)


def stateless(function: Callable[[Params], Params]) -> Transform:
    """Make a transform without a state from a function of the gradient."""

    def update(state, grads):
        check_present(grads)
        return state, function(grads)

    return gradient_only(lambda params: (), update)


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
        msg = (
            f"the direction has no entry for {listed(sorted(missing))}: it must contain every "
            "parameter"
        )
        raise KeyError(msg)
    return treemath.add(params, treemath.cast(direction, params), -rate)


def counter(like: Params) -> Tensor:
    """Make a step counter, a 0-d integer tensor with the value 0 on the parameters' device."""
    first = next(iter(like.values()), torch.zeros(()))
    return first.new_zeros((), dtype=torch.int64)
