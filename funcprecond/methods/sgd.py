"""SGD: no preconditioning."""

from funcprecond.methods.card import card
from funcprecond.transform import Transform, stateless

__all__ = ["sgd"]


@card("SGD", curvature="none", representation="identity", solver="none", learning_rate=0.1)
def sgd() -> Transform:
    """The gradient itself, ``d = g``.

    It is the row that every other is compared with, and a method like the others, so that no script
    changes to switch preconditioning off.

    Returns:
        A method without state.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.sgd(), fp.momentum(0.9), fp.scale(0.1))
    """
    return stateless(lambda grads: grads)
