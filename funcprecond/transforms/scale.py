"""The learning rate."""

from collections.abc import Callable

from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.transform import Transform, counter, gradient_only, stateless
from funcprecond.tree import Params

__all__ = ["scale"]


def scale(factor: float | Tensor | Callable[[Tensor], float | Tensor]) -> Transform:
    """Multiply the direction by a factor, which is the learning rate if this is the end of a chain.

    Args:
        factor: a number; a 0-d tensor, which can change without recompilation, be mapped by
            ``vmap`` and have a gradient; or a schedule. A schedule is a function of the step, which
            is a 0-d integer tensor that counts from 0, and consists of tensor operations.

    Returns:
        A transform. With a schedule, its state is the step.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt = fp.scale(lambda step: 0.5 ** (step + 1))
        >>> grads = {"w": torch.tensor([8.0, 4.0])}
        >>> state, direction = opt.update(opt.init(grads), grads)
        >>> direction["w"], int(state)
        (tensor([4., 2.]), 1)
    """
    if not callable(factor):
        return stateless(lambda grads: treemath.mul(grads, factor))

    def update(step: Tensor, grads: Params) -> tuple[Tensor, Params]:
        return step + 1, treemath.mul(grads, factor(step))

    return gradient_only(counter, update)
