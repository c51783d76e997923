"""A full matrix for each parameter tensor."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond.linalg.precision import factor_dtype
from funcprecond.linalg.treemath import scalar_like
from funcprecond.representation.average import Average, Decay
from funcprecond.representation.representation import WithMatrices
from funcprecond.tree import Params, state

__all__ = ["Dense"]

MAX_ENTRIES = 4096


@state
class Dense:
    """A symmetric (n, n) matrix for each parameter of n entries.

    Attributes:
        average: the average of the measurements, one matrix per parameter.
    """

    average: Average

    accepts: ClassVar[type] = WithMatrices

    @classmethod
    def init(cls, params: Params) -> "Dense":
        """Zero matrices.

        Args:
            params: the parameters.

        Returns:
            The representation.

        Raises:
            ValueError: a parameter has more than 4096 entries.
        """
        for name, p in params.items():
            if p.numel() > MAX_ENTRIES:
                msg = (
                    f"the full matrix of parameter {name!r} {tuple(p.shape)} would have "
                    f"{p.numel()} rows, and the limit is {MAX_ENTRIES}: use shampoo, caspr or a "
                    "diagonal method for this parameter, for example with fp.partition"
                )
                raise ValueError(msg)
        total = {
            k: p.new_zeros((p.numel(), p.numel()), dtype=factor_dtype(p)) for k, p in params.items()
        }
        return cls(Average(total, scalar_like(params)))

    def accumulate(self, value: Any, decay: Decay) -> "Dense":
        """Include a measurement.

        Args:
            value: anything with a ``to_dense()`` that returns one matrix per parameter.
            decay: see :mod:`funcprecond.representation.average`.

        Returns:
            The new representation.
        """
        return Dense(self.average.include(value.to_dense(), decay))

    @property
    def normalizer(self) -> Tensor:
        """The number by which the totals are divided, 0-d."""
        return self.average.normalizer

    def matrices(self) -> dict[str, Tensor]:
        """The averaged matrix of each parameter."""
        return self.average.value()

    def matvec(self, vector: Params) -> Params:
        """The block-diagonal matrix times a vector.

        Args:
            vector: shaped like the parameters.

        Returns:
            Shaped like the parameters. Costs one (n, n) product per parameter of n entries.
        """
        return {
            k: (m @ vector[k].reshape(-1)).reshape(vector[k].shape)
            for k, m in self.matrices().items()
        }

    def trace(self) -> Tensor:
        """The sum of the diagonals, a 0-d tensor."""
        return torch.stack([m.trace() for m in self.matrices().values()]).sum()

    def to_dense(self) -> Tensor:
        """The matrix over all parameters in order, (P, P)."""
        return torch.block_diag(*self.matrices().values())
