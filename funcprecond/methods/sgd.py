"""SGD: no preconditioning."""

from funcprecond.methods.card import card
from funcprecond.transform import Transform, stateless

__all__ = ["sgd"]


@card("SGD", curvature="none", representation="identity", solver="none", learning_rate=0.1)
def sgd() -> Transform:
    """Stochastic gradient descent: the direction is the gradient, ``d = g``.

    It is a method like the others, so that a script can turn preconditioning off by changing one
    line.

    Returns:
        A method without state, which needs the gradient only.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.sgd(), fp.momentum(0.9), fp.scale(0.1))
    """
    return stateless(lambda grads: grads)
