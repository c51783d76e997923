"""Full matrix, one for each parameter tensor."""

from typing import Any

import torch
from torch import Tensor

from funcprecond.linalg.precision import factor_dtype
from funcprecond.representation import average
from funcprecond.representation.diagonal import zero_weight
from funcprecond.tree import Params, state

__all__ = ["Dense"]

MAX_ENTRIES = 4096


@state
class Dense:
    """A symmetric (n, n) matrix for each parameter of n entries.

    Attributes:
        total: by parameter; divided by ``weight`` it is the matrix.
        weight: 0-d, see :mod:`funcprecond.representation.average`.
    """

    total: dict[str, Tensor]
    weight: Tensor

    @classmethod
    def init(cls, params: Params) -> "Dense":
        """Zero.

        Raises:
            ValueError: a parameter has more than 4096 entries.
        """
        for name, p in params.items():
            if p.numel() > MAX_ENTRIES:
                msg = (
                    f"a full matrix for {name!r} {tuple(p.shape)} would have {p.numel()} rows; the "
                    f"limit is {MAX_ENTRIES}: use shampoo, caspr or a diagonal method for it, for "
                    "example by fp.partition"
                )
                raise ValueError(msg)
        total = {
            k: p.new_zeros((p.numel(), p.numel()), dtype=factor_dtype(p)) for k, p in params.items()
        }
        return cls(total, zero_weight(params))

    def accumulate(self, value: Any, decay: average.Decay) -> "Dense":
        """Take in a measurement, anything with a ``to_dense()`` by parameter."""
        new, at = value.to_dense(), average.at(self.weight, decay)
        total = {k: average.accumulate(t, new[k], at) for k, t in self.total.items()}
        return Dense(total, average.weight(self.weight, at))

    def matrices(self) -> dict[str, Tensor]:
        """The averaged matrix of each parameter."""
        return {k: t / self.weight for k, t in self.total.items()}

    def matvec(self, vector: Params) -> Params:
        """The block-diagonal matrix times a vector shaped like the parameters."""
        return {
            k: (m @ vector[k].reshape(-1)).reshape(vector[k].shape)
            for k, m in self.matrices().items()
        }

    def trace(self) -> Tensor:
        """The sum of the diagonals, a 0-d tensor."""
        return torch.stack([m.trace() for m in self.matrices().values()]).sum()

    def to_dense(self) -> Tensor:
        """(P, P), all parameters in order."""
        return torch.block_diag(*self.matrices().values())
