"""The diagonal of the curvature matrix."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.representation.average import Average, Decay
from funcprecond.representation.representation import WithDiagonal
from funcprecond.tree import Params, state

__all__ = ["Diagonal"]


@state
class Diagonal:
    """One number for each entry of each parameter, in float32 or wider.

    Attributes:
        average: the average of the measurements, shaped like the parameters.
    """

    average: Average

    accepts: ClassVar[type] = WithDiagonal

    @classmethod
    def init(cls, params: Params) -> "Diagonal":
        """A diagonal of zeros.

        Args:
            params: the parameters.

        Returns:
            The representation.
        """
        return cls(Average(treemath.zeros_like(params), treemath.scalar_like(params)))

    def accumulate(self, value: Any, decay: Decay) -> "Diagonal":
        """Include a measurement.

        Args:
            value: anything with a ``diagonal()``.
            decay: see :mod:`funcprecond.representation.average`.

        Returns:
            The new representation.
        """
        return Diagonal(self.average.include(value.diagonal(), decay))

    def diagonal(self) -> Params:
        """The averaged diagonal, shaped like the parameters."""
        return self.average.value()

    def matvec(self, vector: Params) -> Params:
        """The diagonal matrix times a vector.

        Args:
            vector: shaped like the parameters.

        Returns:
            Shaped like the parameters. Costs one multiplication per entry.
        """
        return {k: d * vector[k] for k, d in self.diagonal().items()}

    def trace(self) -> Tensor:
        """The sum of the diagonal, a 0-d tensor."""
        return torch.stack([d.sum() for d in self.diagonal().values()]).sum()

    def to_dense(self) -> Tensor:
        """The matrix over all parameters in order, (P, P)."""
        return torch.diag(treemath.ravel(self.diagonal()))
