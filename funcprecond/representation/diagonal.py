"""Element-wise: the diagonal of the curvature matrix."""

from typing import Any

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.precision import factor_dtype
from funcprecond.representation import average
from funcprecond.tree import Params, state

__all__ = ["Diagonal"]


@state
class Diagonal:
    """One number for each parameter entry, in float32 or wider.

    Attributes:
        total: shaped like the parameters; divided by ``weight`` it is the diagonal.
        weight: 0-d, see :mod:`funcprecond.representation.average`.
    """

    total: Params
    weight: Tensor

    @classmethod
    def init(cls, params: Params) -> "Diagonal":
        """Zero."""
        total = {k: torch.zeros_like(p, dtype=factor_dtype(p)) for k, p in params.items()}
        return cls(total, zero_weight(params))

    def accumulate(self, value: Any, decay: average.Decay) -> "Diagonal":
        """Take in a measurement, anything with a ``diagonal()``."""
        new, at = value.diagonal(), average.at(self.weight, decay)
        total = {k: average.accumulate(t, new[k], at) for k, t in self.total.items()}
        return Diagonal(total, average.weight(self.weight, at))

    def diagonal(self) -> Params:
        """The averaged diagonal."""
        return {k: t / self.weight for k, t in self.total.items()}

    def matvec(self, vector: Params) -> Params:
        """The matrix times a vector shaped like the parameters."""
        return {k: d * vector[k] for k, d in self.diagonal().items()}

    def trace(self) -> Tensor:
        """The sum of the diagonal, a 0-d tensor."""
        return torch.stack([d.sum() for d in self.diagonal().values()]).sum()

    def to_dense(self) -> Tensor:
        """(P, P), all parameters in order."""
        return torch.diag(treemath.ravel(self.diagonal()))


def zero_weight(params: Params) -> Tensor:
    """A 0-d zero on the parameters' device."""
    first = next(iter(params.values()), torch.zeros(()))
    return first.new_zeros((), dtype=factor_dtype(first))
