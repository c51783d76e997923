"""SGD: no preconditioning.

The row that every other is compared with, and a method like the others, so that no script changes
to switch preconditioning off: ``chain(sgd(), momentum(0.9), scale(0.1))``.
"""

from funcprecond.methods.table import Card
from funcprecond.transform import Transform, stateless

__all__ = ["sgd"]


def sgd() -> Transform:
    """The gradient itself."""
    return stateless(lambda grads: grads)


CARDS = (Card("sgd", "SGD", "none", "identity", "none", sgd, learning_rate=0.1),)
