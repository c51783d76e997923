"""One factor per axis of a parameter tensor: the Gram matrices of Shampoo and its relatives."""

from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.curvature.gradient import OuterProduct
from funcprecond.linalg.axes import grams
from funcprecond.linalg.batching import over_stacks
from funcprecond.linalg.blocking import Blocking
from funcprecond.linalg.precision import factor_dtype
from funcprecond.linalg.treemath import scalar_like
from funcprecond.representation.average import Average, Decay
from funcprecond.tree import Params, state, static

__all__ = ["KroneckerDim"]


@state
class KroneckerDim:
    """``S_i = Σ unfold_i(G) unfold_i(G)^T`` for the axes i of every block of every parameter.

    The blocks and their axes follow from the shapes alone, see
    :class:`funcprecond.linalg.blocking.Blocking`. A parameter without factors (a vector, a scalar)
    keeps the diagonal of its second moment instead.

    Attributes:
        average: the average of the measurements, with two entries. ``factors`` is a tuple of
            (n_i, n_i) matrices for each block. ``diagonals`` is the square of the gradient, entry
            by entry, for each parameter without factors.
        blocking: how parameters are cut into blocks.
    """

    average: Average
    blocking: Blocking = static(default=Blocking())

    accepts: ClassVar[type] = OuterProduct

    @classmethod
    def init(cls, params: Params, blocking: Blocking | None = None) -> "KroneckerDim":
        """Factors and diagonals of zeros.

        Args:
            params: the parameters.
            blocking: how parameters are cut into blocks; by default, every parameter is a single
                block.

        Returns:
            The representation.
        """
        blocking = Blocking() if blocking is None else blocking
        factors, diagonals = {}, {}
        for name, p in params.items():
            dtype = factor_dtype(p)
            if not blocking.has_factors(p.shape):
                diagonals[name] = torch.zeros_like(p, dtype=dtype)
                continue
            for block, x in blocking.split(name, p).items():
                sizes = [x.shape[i] for i in blocking.axes(x.shape)]
                factors[block] = tuple(p.new_zeros((n, n), dtype=dtype) for n in sizes)
        return cls(
            Average({"factors": factors, "diagonals": diagonals}, scalar_like(params)), blocking
        )

    def accumulate(self, value: OuterProduct, decay: Decay) -> "KroneckerDim":
        """Include a measurement.

        Args:
            value: the outer product of a gradient with itself.
            decay: see :mod:`funcprecond.representation.average`.

        Returns:
            The new representation. Costs one Gram matrix per axis.
        """
        blocks: Params = {}
        diagonals: Params = {}
        for name, g in value.grads.items():
            # The cast comes first: a Gram matrix in bfloat16 has lost its small eigenvalues.
            g = g.to(factor_dtype(g))
            if name in self.diagonals:
                diagonals[name] = g.square()
            else:
                blocks |= self.blocking.split(name, g)
        found = over_stacks(
            grams,
            list(blocks.values()),
            static=[self.blocking.axes(x.shape) for x in blocks.values()],
        )
        new = {"factors": dict(zip(blocks, found, strict=True)), "diagonals": diagonals}
        return KroneckerDim(self.average.include(new, decay), self.blocking)

    @property
    def totals(self) -> dict[str, tuple[Tensor, ...]]:
        """The factors of each block, times the normalizer."""
        return self.average.total["factors"]

    @property
    def diagonals(self) -> Params:
        """The second moments of the parameters without factors, times the normalizer."""
        return self.average.total["diagonals"]

    @property
    def normalizer(self) -> Tensor:
        """The number by which the totals are divided, 0-d."""
        return self.average.normalizer

    def factors(self) -> dict[str, tuple[Tensor, ...]]:
        """The averaged factors of each block, a tuple of (n_i, n_i) matrices."""
        return self.average.value()["factors"]
