"""The learning rate."""

from collections.abc import Callable

from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.transform import Transform, counter, gradient_only, stateless
from funcprecond.tree import Params

__all__ = ["scale"]


def scale(factor: float | Tensor | Callable[[Tensor], float | Tensor]) -> Transform:
    """Multiply the direction; last in a chain, it is the learning rate.

    Args:
        factor: a number, a 0-d tensor (no recompilation for another value, ``vmap`` over it,
            gradients with respect to it), or a schedule: a function of the step, a 0-d integer
            tensor counted from 0, made of tensor operations.
    """
    if not callable(factor):
        return stateless(lambda grads: treemath.mul(grads, factor))

    def update(step: Tensor, grads: Params) -> tuple[Tensor, Params]:
        return step + 1, treemath.mul(grads, factor(step))

    return gradient_only(counter, update)
