"""Momentum of what comes before it in the chain."""

from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.transform import Transform, gradient_only
from funcprecond.tree import Params

__all__ = ["momentum"]


def momentum(
    decay: float | Tensor = 0.9, *, nesterov: bool = False, average: bool = False
) -> Transform:
    """Heavy-ball momentum ``m <- decay m + d``, and the direction ``m``.

    Args:
        decay: the weight of the old direction.
        nesterov: the direction ``d + decay m`` instead, with the new ``m``.
        average: weight ``d`` by ``1 - decay``, so that the step keeps its length.

    After a preconditioner it averages directions, before one gradients. State: one copy of the
    parameters.
    """

    def init(params: Params) -> Params:
        return {k: p.new_zeros(p.shape) for k, p in params.items()}

    def update(state: Params, grads: Params) -> tuple[Params, Params]:
        if average:
            grads = treemath.mul(grads, 1 - decay)
        new = treemath.add(grads, state, decay)
        return new, treemath.add(grads, new, decay) if nesterov else new

    return gradient_only(init, update)
