"""Gradient accumulation: one update for several batches."""

from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.observe import Every, Evidence
from funcprecond.problem import Params
from funcprecond.transform import Transform, counter
from funcprecond.tree import state

__all__ = ["Accumulated", "accumulate"]


@state
class Accumulated:
    """The inner state, the running mean of the gradients, and how many are in it."""

    inner: Any
    mean: Params
    count: Tensor


def accumulate(transform: Transform, steps: int) -> Transform:
    """Hand ``transform`` the mean gradient of ``steps`` successive batches.

    On the steps between, the direction is zero and the inner state stays. Inner needs are measured
    on the last batch of each group, and inner intervals count groups.

    Raises:
        ValueError: ``steps`` is less than 1.
    """
    if steps < 1:
        msg = f"accumulate: steps must be at least 1, not {steps}"
        raise ValueError(msg)
    last = Every(f"update of {steps} batches")

    def init(params: Params) -> Accumulated:
        zeros = {k: torch.zeros_like(p) for k, p in params.items()}
        return Accumulated(transform.init(params), zeros, counter(params))

    def update(state: Accumulated, grads: Params, evidence: Evidence) -> tuple[Accumulated, Params]:
        count = state.count + 1
        mean = {k: m + (grads[k] - m) / count for k, m in state.mean.items()}
        if last not in evidence:
            return Accumulated(state.inner, mean, count), tree.mul(grads, 0.0)
        inner, direction = transform.update(state.inner, mean, evidence)
        return Accumulated(inner, tree.mul(mean, 0.0), torch.zeros_like(count)), direction

    def needs(t: int) -> tuple:
        return (last, *transform.needs(t // steps)) if t % steps == steps - 1 else ()

    return Transform(init, update, needs)
