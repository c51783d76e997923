"""The contract of stage 2: what a representation has to be, and what it can take in."""

from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from torch import Tensor

from funcprecond.representation.average import Decay
from funcprecond.tree import Params

__all__ = ["Representation", "WithDiagonal", "WithMatrices"]


class Representation(Protocol):
    """How a curvature matrix is stored: an immutable tree of tensors.

    Attributes:
        accepts: the type of the measurements that it can take in: a class, or one of the protocols
            here. :func:`funcprecond.compose` compares it with what the curvature's need ``gives``.
    """

    accepts: ClassVar[type]

    @classmethod
    def init(cls, params: Params) -> Self:
        """The representation before the first measurement; raises ValueError if it is too large."""
        ...

    def accumulate(self, value: Any, decay: Decay) -> Self:
        """The representation after one more measurement."""
        ...


@runtime_checkable
class WithDiagonal(Protocol):
    """A measurement that has a diagonal."""

    def diagonal(self) -> Params:
        """Shaped like the parameters."""
        ...


@runtime_checkable
class WithMatrices(Protocol):
    """A measurement that has a matrix for each parameter."""

    def to_dense(self) -> dict[str, Tensor]:
        """(n, n) for a parameter of n entries."""
        ...
