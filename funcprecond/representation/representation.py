"""The protocols of stage 2: representations, and the measurements that they accept."""

from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from torch import Tensor

from funcprecond.representation.average import Decay
from funcprecond.tree import Params

__all__ = ["Representation", "WithDiagonal", "WithMatrices"]


class Representation(Protocol):
    """The storage of a curvature matrix: an immutable tree of tensors.

    Attributes:
        accepts: the type of the measurements that it accepts: a class, or one of the protocols in
            this file. :func:`funcprecond.compose` compares it with the type that the curvature's
            need ``gives``.
    """

    accepts: ClassVar[type]

    @classmethod
    def init(cls, params: Params) -> Self:
        """The representation before the first measurement.

        Args:
            params: the parameters, of which the names and the shapes are used.

        Returns:
            The representation.

        Raises:
            ValueError: the representation would be too large.
        """
        ...

    def accumulate(self, value: Any, decay: Decay) -> Self:
        """The representation after one more measurement.

        Args:
            value: a measurement, of the type :attr:`accepts`.
            decay: how the measurement is combined with the old ones, see
                :mod:`funcprecond.representation.average`.

        Returns:
            The new representation.
        """
        ...


@runtime_checkable
class WithDiagonal(Protocol):
    """A measurement that has a diagonal."""

    def diagonal(self) -> Params:
        """The diagonal, shaped like the parameters."""
        ...


@runtime_checkable
class WithMatrices(Protocol):
    """A measurement that has a matrix for each parameter."""

    def to_dense(self) -> dict[str, Tensor]:
        """The matrix of each parameter, (n, n) for a parameter of n entries."""
        ...
