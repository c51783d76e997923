"""Skipping steps whose gradient is not finite."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_structure

from funcprecond.evidence import Evidence
from funcprecond.transform import Transform, counter
from funcprecond.tree import Params, state

__all__ = ["Guarded", "skip_nonfinite"]


@state
class Guarded:
    """The inner state, and how many steps were skipped so far, a 0-d integer tensor."""

    inner: Any
    skipped: Tensor


def skip_nonfinite(transform: Transform) -> Transform:
    """Leave the state as it was and step nowhere if the gradient or the direction has a NaN or inf.

    Decided on the device, without a host synchronisation: both outcomes are computed. A method that
    learns its layers from the first evidence has no old state to keep then: its first step must be
    finite.
    """

    def init(params: Params) -> Guarded:
        return Guarded(transform.init(params), counter(params))

    def update(
        state: Guarded, grads: Params, evidence: Evidence | None = None
    ) -> tuple[Guarded, Params]:
        # Zeros in place of a bad gradient: decompositions raise on NaN instead of passing it on.
        good = _finite(grads)
        clean = {k: torch.where(good, g, torch.zeros_like(g)) for k, g in grads.items()}
        inner, direction = transform.update(state.inner, clean, evidence)
        good = good & _finite(direction)
        kept = inner
        if tree_structure(inner) == tree_structure(state.inner):
            kept = tree_map(lambda new, old: torch.where(good, new, old), inner, state.inner)
        direction = {k: torch.where(good, d, torch.zeros_like(d)) for k, d in direction.items()}
        return Guarded(kept, state.skipped + (~good).long()), direction

    return Transform(init, update, transform.needs)


def _finite(values: Params) -> Tensor:
    if not values:
        return torch.ones((), dtype=torch.bool)
    return torch.stack([torch.isfinite(v).all() for v in values.values()]).all()
