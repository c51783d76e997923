"""Steps that are skipped if their gradient is not finite."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.evidence import Evidence
from funcprecond.transform import Transform, check_present, counter
from funcprecond.tree import Params, state

__all__ = ["Guarded", "skip_nonfinite"]


@state
class Guarded:
    """The state of :func:`skip_nonfinite`.

    Attributes:
        inner: the state of the method.
        skipped: the number of skipped steps so far, a 0-d integer tensor.
    """

    inner: Any
    skipped: Tensor


def skip_nonfinite(transform: Transform) -> Transform:
    """Keep the state and return a zero direction if the gradient or the direction is not finite.

    The decision is made on the device, without synchronization with the host, so that both outcomes
    are computed. A method that finds its layers with the evidence has no old state to keep for new
    ones; where their first step is skipped, they have zeros for a state.

    Args:
        transform: the method.

    Returns:
        A transform with the needs of the method; its state is a :class:`Guarded`.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt = fp.skip_nonfinite(fp.momentum())
        >>> grads = {"w": torch.tensor([1.0, float("nan")])}
        >>> state, direction = opt.update(opt.init(grads), grads)
        >>> direction["w"], int(state.skipped)
        (tensor([0., 0.]), 1)
    """

    def init(params: Params) -> Guarded:
        return Guarded(transform.init(params), counter(params))

    def update(
        state: Guarded, grads: Params, evidence: Evidence | None = None
    ) -> tuple[Guarded, Params]:
        check_present(grads)
        # Zeros replace a bad gradient, because some decompositions raise an error for NaN.
        good = _finite(grads)
        clean = {k: torch.where(good, g, torch.zeros_like(g)) for k, g in grads.items()}
        inner, direction = transform.update(state.inner, clean, evidence)
        good = good & _finite(direction)
        old = state.inner
        if tree.flatten(inner)[1] != tree.flatten(old)[1]:
            old = _grown(old, inner)
        kept = tree.map(lambda new, old: torch.where(good, new, old), inner, old)
        direction = {k: torch.where(good, d, torch.zeros_like(d)) for k, d in direction.items()}
        return Guarded(kept, state.skipped + (~good).long()), direction

    return Transform(init, update, transform.needs)


def _grown(old: Any, new: Any) -> Any:
    """An old state with the structure of a new one, in which layers that were found are empty."""
    if hasattr(old, "grown"):
        return old.grown(new)
    if isinstance(new, dict):
        return {
            k: _grown(old[k], x) if k in old else tree.map(torch.zeros_like, x)
            for k, x in new.items()
        }
    if isinstance(new, Tensor):
        return old
    if type(new) is tuple:
        return tuple(_grown(a, b) for a, b in zip(old, new, strict=True))
    changed = [f.name for f in dataclasses.fields(new) if not f.metadata.get("static")]
    return dataclasses.replace(
        new, **{k: _grown(getattr(old, k), getattr(new, k)) for k in changed}
    )


def _finite(values: Params) -> Tensor:
    if not values:
        return torch.ones((), dtype=torch.bool)
    return torch.stack([torch.isfinite(v).all() for v in values.values()]).all()
