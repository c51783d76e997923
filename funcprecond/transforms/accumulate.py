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
    """The state of :func:`accumulate`.

    Attributes:
        inner: the state of the method.
        mean: the running mean of the gradients.
        count: the number of gradients in the mean, a 0-d integer tensor.
    """

    inner: Any
    mean: Params
    count: Tensor


def accumulate(transform: Transform, steps: int) -> Transform:
    """Update a method once for ``steps`` successive batches, with the mean of their gradients.

    At the other steps the direction is zero and the state of the method does not change. The needs
    of the method are measured on the last batch of each group, and its intervals count groups.

    Args:
        transform: the method.
        steps: the number of batches in a group.

    Returns:
        A transform; its state is an :class:`Accumulated`. Its ``update`` requires evidence, and
        raises :class:`funcprecond.MissingEvidence` without it.

    Raises:
        ValueError: ``steps`` is less than 1.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> opt, batch = fp.accumulate(fp.sgd(), steps=2), (torch.ones(8, 4), torch.arange(8) % 3)
        >>> step = fp.make_step(problem, opt)
        >>> params, state, _ = step(problem.params, opt.init(problem.params), batch, t=0)
        >>> torch.equal(params["weight"], problem.params["weight"]), int(state.count)
        (True, 1)
    """
    if steps < 1:
        msg = f"steps of accumulate must be at least 1, not {steps!r}"
        raise ValueError(msg)
    last = Every(f"update of {steps} batches")

    def init(params: Params) -> Accumulated:
        return Accumulated(transform.init(params), _zeros(params), counter(params))

    def update(
        state: Accumulated, grads: Params, evidence: Evidence | None = None
    ) -> tuple[Accumulated, Params]:
        if evidence is None:
            msg = (
                "accumulate finds the last batch of a group in the evidence, and there is none: "
                "pass the evidence of fp.observe(problem, params, batch, opt.needs(t)) to update"
            )
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
    # A product with zero would not be zero where an entry is not finite.
    return {k: torch.zeros_like(x) for k, x in like.items()}
