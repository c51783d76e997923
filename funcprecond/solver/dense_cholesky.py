"""Dense blocks, damped and decomposed: ``(C + λ I)^-1 g`` as it is written."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg import treemath
from funcprecond.linalg.precision import wide
from funcprecond.need import Need
from funcprecond.representation.dense_blocks import DenseBlocks
from funcprecond.tree import Params, state, static

__all__ = ["DenseCholesky", "DenseFactor"]


@state
class DenseFactor:
    """The lower Cholesky factor of each damped block, :func:`wide`.

    Attributes:
        lower: (n, n), by block.
        names: the names of all parameters.
    """

    lower: dict[str, Tensor]
    names: tuple[str, ...] = static()


@dataclasses.dataclass(frozen=True)
class DenseCholesky:
    """The inverse of each damped block.

    Attributes:
        damping: λ, positive. A value below the rounding error of a block is raised to this error,
            which is the trace times the machine epsilon of its dtype.
    """

    damping: float | Tensor = 1e-3
    accepts: ClassVar[tuple[type, ...]] = (DenseBlocks,)
    needs: ClassVar[tuple[Need, ...]] = ()
    staggers: ClassVar[bool] = False

    def init(self, representation: DenseBlocks) -> DenseFactor:
        """An empty dict, like those of the representation.

        Args:
            representation: the representation before the first measurement.

        Returns:
            The factor.
        """
        return DenseFactor({}, representation.names)

    def prepare(self, representation: DenseBlocks, previous: DenseFactor) -> DenseFactor:
        """Decompose the damped blocks.

        Args:
            representation: the curvature.
            previous: not used.

        Returns:
            The factor. Costs ``n³ / 3`` operations for each block of n entries.
        """
        lower = {}
        for block, matrix in representation.matrices().items():
            x = wide(matrix)
            floor = torch.finfo(matrix.dtype).eps * x.diagonal().sum()
            damping = (torch.zeros_like(floor) + self.damping).maximum(floor)
            damped = torch.diagonal_scatter(x, x.diagonal() + damping)
            # This does not raise: a matrix with NaN gives a factor with NaN, for skip_nonfinite.
            lower[block], _ = torch.linalg.cholesky_ex(damped)
        return DenseFactor(lower, representation.names)

    def apply(self, factor: DenseFactor, grads: Params, evidence: Evidence | None = None) -> Params:
        """Solve with each block.

        Args:
            factor: the result of :meth:`prepare`.
            grads: the gradient.
            evidence: not used.

        Returns:
            The direction. Costs ``2 n²`` operations for each block of n entries. A parameter that
            no measurement had so far keeps its gradient.
        """
        found = {}
        for block, lower in factor.lower.items():
            names = factor.names if block == "all" else block.split("+")
            own = {k: wide(grads[k]) for k in names}
            solved = torch.cholesky_solve(treemath.ravel(own).unsqueeze(1), lower).squeeze(1)
            found |= treemath.unravel(solved, own)
        return {k: found[k].to(g.dtype) if k in found else g for k, g in grads.items()}
