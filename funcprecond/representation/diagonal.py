"""Element-wise: the diagonal of the curvature matrix."""

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
    """One number for each parameter entry, in float32 or wider.

    Attributes:
        average: over the measurements, shaped like the parameters.
    """

    average: Average

    accepts: ClassVar[type] = WithDiagonal

    @classmethod
    def init(cls, params: Params) -> "Diagonal":
        """Zero."""
        return cls(Average(treemath.zeros_like(params), treemath.scalar_like(params)))

    def accumulate(self, value: Any, decay: Decay) -> "Diagonal":
        """Take in a measurement, anything with a ``diagonal()``."""
        return Diagonal(self.average.include(value.diagonal(), decay))

    def diagonal(self) -> Params:
        """The averaged diagonal."""
        return self.average.value()

    def matvec(self, vector: Params) -> Params:
        """The matrix times a vector shaped like the parameters."""
        return {k: d * vector[k] for k, d in self.diagonal().items()}

    def trace(self) -> Tensor:
        """The sum of the diagonal, a 0-d tensor."""
        return torch.stack([d.sum() for d in self.diagonal().values()]).sum()

    def to_dense(self) -> Tensor:
        """(P, P), all parameters in order."""
        return torch.diag(treemath.ravel(self.diagonal()))
