"""Momentum of the directions that precede it in the chain."""

from torch import Tensor

from funcprecond.checks import checked
from funcprecond.linalg import treemath
from funcprecond.transform import Transform, fitted, gradient_only
from funcprecond.tree import Params

__all__ = ["momentum"]


@checked
def momentum(
    decay: float | Tensor = 0.9, *, nesterov: bool = False, average: bool = False
) -> Transform:
    """Heavy-ball momentum: ``m <- decay m + d``, with the direction ``m``.

    After a preconditioner it accumulates directions, before one it accumulates gradients.

    Args:
        decay: the factor of the old ``m``.
        nesterov: return ``d + decay m`` with the new ``m`` instead.
        average: multiply ``d`` by ``1 - decay``, so that the length of the step does not change.

    Returns:
        A transform. Its state is ``m``, one copy of the parameters.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt, grads = fp.momentum(0.5), {"w": torch.tensor([1.0, 2.0])}
        >>> state, direction = opt.update(opt.init(grads), grads)
        >>> state, direction = opt.update(state, grads)
        >>> direction["w"]
        tensor([1.5000, 3.0000])
    """

    def init(params: Params) -> Params:
        return {k: p.new_zeros(p.shape) for k, p in params.items()}

    def update(state: Params, grads: Params) -> tuple[Params, Params]:
        if average:
            grads = treemath.mul(grads, 1 - decay)
        new = treemath.add(grads, state, decay)
        return new, treemath.add(grads, new, decay) if nesterov else new

    return fitted(gradient_only(init, update), lambda state: state)
