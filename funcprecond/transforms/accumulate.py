"""Gradient accumulation: one update for several batches."""

from typing import Any

import torch
from torch import Tensor

from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.need import Every
from funcprecond.transform import Transform, counter
from funcprecond.tree import Params, state

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
        return Accumulated(transform.init(params), _zeros(params), counter(params))

    def update(
        state: Accumulated, grads: Params, evidence: Evidence | None = None
    ) -> tuple[Accumulated, Params]:
        if evidence is None:
            msg = "accumulate needs to know when a group is full: pass the evidence of fp.observe"
            raise MissingEvidence(msg)
        count = state.count + 1
        mean = {k: m + (grads[k] - m) / count for k, m in state.mean.items()}
        if last not in evidence:
            return Accumulated(state.inner, mean, count), _zeros(grads)
        inner, direction = transform.update(state.inner, mean, evidence)
        return Accumulated(inner, _zeros(mean), torch.zeros_like(count)), direction

    def needs(t: int) -> tuple:
        return (last, *transform.needs(t // steps)) if t % steps == steps - 1 else ()

    return Transform(init, update, needs)


def _zeros(like: Params) -> Params:
    # Not a product with zero, which is no zero where an entry is not finite.
    return {k: torch.zeros_like(x) for k, x in like.items()}
