"""Gradient accumulation: one update for several batches."""

from typing import Any

import torch
from torch import Tensor

from funcprecond.checks import checked
from funcprecond.curvature.batch_weight import BatchWeight
from funcprecond.evidence import Evidence, MissingEvidence, is_due
from funcprecond.linalg import treemath
from funcprecond.need import Every, NotDue
from funcprecond.transform import Transform, fitted
from funcprecond.tree import Params, state

__all__ = ["Accumulated", "accumulate"]

_WEIGHT = BatchWeight()


@state
class Accumulated:
    """The state of :func:`accumulate`.

    Attributes:
        inner: the state of the method.
        gradient: the gradient of the loss of the batches so far, in float32 or wider.
        weight: the sum of their weights, a 0-d tensor.
    """

    inner: Any
    gradient: Params
    weight: Tensor


@checked
def accumulate(transform: Transform, steps: int) -> Transform:
    """Update a method once for ``steps`` successive batches, with the gradient of all of them.

    It is the gradient of one batch with all their examples, also if the batches differ in size or
    in the number of targets that are not ignored::

        mean loss:    g = Σ_b w_b g_b / Σ_b w_b,   w_b = 1 / c_b
        summed loss:  g = Σ_b g_b

    c_b is the reduction constant of the loss on batch b, such as one over the number of its
    examples; for a loss of your own, see :class:`funcprecond.losses.Custom`. At the other steps the
    direction is zero and the state of the method does not change. The needs of the method are
    measured on the last batch of each group, and its intervals count groups. With a summed loss the
    curvature is thus that of one batch and the gradient that of the group, so use a mean loss with
    a method that measures curvature.

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
        >>> torch.equal(params["weight"], problem.params["weight"]), int(state.weight)
        (True, 8)
    """
    if steps < 1:
        msg = f"steps of accumulate must be at least 1, not {steps!r}"
        raise ValueError(msg)
    last = Every(f"update of {steps} batches")

    def init(params: Params) -> Accumulated:
        return Accumulated(
            transform.init(params), treemath.zeros_like(params), treemath.scalar_like(params)
        )

    def update(
        state: Accumulated, grads: Params, evidence: Evidence | None = None
    ) -> tuple[Accumulated, Params]:
        if evidence is None:
            msg = (
                "accumulate finds the last batch of a group and the weight of each batch in the "
                "evidence, and there is none: pass the evidence of "
                "fp.observe(problem, params, batch, opt.needs(t)) to update"
            )
            raise MissingEvidence(msg)
        batch = evidence[_WEIGHT]
        weight = state.weight + batch.value
        # The gradient of a mean over no terms is 0 / 0, and its weight is zero.
        share = torch.where(batch.value > 0, batch.value / weight, 0.0)
        gradient = {
            k: x + grads[k]
            if batch.is_sum
            else x + torch.where(share > 0, share * (grads[k] - x), 0.0)
            for k, x in state.gradient.items()
        }
        gradient = treemath.cast(gradient, state.gradient)
        if not is_due(last, evidence):
            return Accumulated(state.inner, gradient, weight), _zeros(grads)
        inner, direction = transform.update(state.inner, treemath.cast(gradient, grads), evidence)
        return Accumulated(inner, _zeros(gradient), torch.zeros_like(weight)), direction

    def needs(t: int) -> tuple:
        if t % steps < steps - 1:
            return (_WEIGHT, NotDue(last))
        return (_WEIGHT, last, *transform.needs(t // steps))

    return fitted(Transform(init, update, needs), lambda state: state.gradient)


def _zeros(like: Params) -> Params:
    # A product with zero would not be zero where an entry is not finite.
    return {k: torch.zeros_like(x) for k, x in like.items()}
