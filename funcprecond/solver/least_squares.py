"""Damped least squares, ``min_p ‖J p - r‖² + λ ‖p‖²``, through the smaller of two matrices.

With R rows and P parameters, the solution is::

    R < P:   p = J^T (J J^T + λ I)^-1 r         (R, R)
    R >= P:  p = (J^T J + λ I)^-1 J^T r         (P, P)
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.curvature.residual_rows import Residuals
from funcprecond.linalg import treemath
from funcprecond.linalg.gram import gram
from funcprecond.linalg.precision import wide
from funcprecond.representation.gram import Gram
from funcprecond.solver.smw import SMW, Woodbury, damped_cholesky
from funcprecond.tree import Params, state

__all__ = ["LeastSquares", "NormalEquations"]


@state
class NormalEquations:
    """The matrix of the normal equations, decomposed.

    Attributes:
        rows: J, formed, (R, P).
        cholesky: the lower Cholesky factor of ``J^T J + λ I``, (P, P), :func:`wide`.
    """

    rows: Tensor
    cholesky: Tensor


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """The damped inverse of ``J^T J``.

    Attributes:
        damping: λ, positive. A value below the rounding error of ``J^T J`` is raised to this error,
            which is the trace times the machine epsilon of the dtype.
    """

    damping: float | Tensor = 1e-2
    accepts: ClassVar[tuple[type, ...]] = (Gram,)

    def prepare(self, representation: Gram, params: Params) -> Woodbury | NormalEquations:
        """Decompose the smaller one of the two damped matrices.

        Args:
            representation: J.
            params: the parameters, of which only the number of entries is used.

        Returns:
            The factor. Costs at most ``R P min(R, P)`` operations for the matrix, and a third of
            ``min(R, P)^3`` for the decomposition, :func:`wide`.
        """
        if representation.count < sum(p.numel() for p in params.values()):
            return SMW(self.damping).prepare(representation)
        rows = representation.rows()
        return NormalEquations(rows, damped_cholesky(gram(rows), self.damping)[0])

    def from_residual(
        self, factor: Woodbury | NormalEquations, residual: Tensor, like: Params
    ) -> Params:
        """``(J^T J + λ I)^-1 J^T r``, the solution of the least squares.

        Args:
            factor: the result of :meth:`prepare`.
            residual: r, (R,).
            like: the parameters.

        Returns:
            Shaped like the parameters, in the dtypes of ``like``.
        """
        if isinstance(factor, Woodbury):
            return SMW(self.damping).push_through(factor, residual, like)
        return _unraveled(_solved(factor, factor.rows.mT @ residual), like)

    def apply(self, factor: Woodbury | NormalEquations, grads: Params) -> Params:
        """``(J^T J + λ I)^-1 v`` for any vector v.

        Args:
            factor: the result of :meth:`prepare`.
            grads: v, shaped like the parameters.

        Returns:
            Shaped like the parameters, in the dtypes of ``grads``.
        """
        if isinstance(factor, Woodbury):
            return SMW(self.damping).apply(factor, grads)
        return _unraveled(_solved(factor, treemath.ravel_wide(grads)), grads)

    def step(
        self,
        factor: Woodbury | NormalEquations,
        measured: Residuals,
        grads: Params,
        is_own: bool,
    ) -> Params:
        """``(J^T J + λ I)^-1 g / m`` for a gradient g, which is ``m J^T r`` for that of the batch.

        Args:
            factor: the result of :meth:`prepare`.
            measured: the residuals r and the number m.
            grads: g.
            is_own: whether g is known to be the gradient of this batch, whose r is more accurate.

        Returns:
            Shaped like the parameters, in the dtypes of ``grads``.
        """
        if is_own and measured.residual.numel():
            return self.from_residual(factor, measured.residual, grads)
        multiple = measured.multiple
        return self.apply(factor, {k: g / multiple.to(g.dtype) for k, g in grads.items()})


def _solved(factor: NormalEquations, right: Tensor) -> Tensor:
    return torch.cholesky_solve(wide(right).unsqueeze(-1), factor.cholesky).squeeze(-1)


def _unraveled(vector: Tensor, like: Params) -> Params:
    return treemath.cast(treemath.unravel(vector, like), like)
