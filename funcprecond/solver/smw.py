"""The Sherman-Morrison-Woodbury formula: ``(U^T U + λ I)^-1`` from the small ``λ I + U U^T``.

For any vector v, ``x = (v - U^T (λ I + U U^T)^-1 U v) / λ``, which suffers from cancellation if λ
is small relative to ``U U^T``. For a vector in the span of the rows of U, ``v = U^T y``, the same x
is ``U^T (λ I + U U^T)^-1 y``, without a division by λ and without cancellation.
"""

import dataclasses
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.precision import wide
from funcprecond.representation.gram import Gram
from funcprecond.tree import Params, state

__all__ = ["SMW", "Rows", "Woodbury", "damped_cholesky"]


class Rows(Protocol):
    """What Woodbury's formula needs of U: :class:`Gram`, or something with the same products."""

    def gram(self) -> Tensor:
        """``U U^T``, (R, R)."""
        ...

    def matvec(self, vector: Params) -> Tensor:
        """``U v``, (R,)."""
        ...

    def rmatvec(self, weights: Tensor) -> Params:
        """``U^T y``, shaped like the parameters."""
        ...


@state
class Woodbury:
    """A Gram matrix, decomposed.

    Attributes:
        rows: U.
        cholesky: the lower Cholesky factor of ``λ I + U U^T``, (R, R), :func:`wide`.
        damping: λ, 0-d, :func:`wide`.
    """

    rows: Rows
    cholesky: Tensor
    damping: Tensor


@dataclasses.dataclass(frozen=True)
class SMW:
    """The damped inverse of ``U^T U``.

    Attributes:
        damping: λ, positive. A value below the rounding error of ``U U^T`` is raised to this error,
            which is the trace times the machine epsilon of the dtype.
    """

    damping: float | Tensor = 1e-2
    accepts: ClassVar[tuple[type, ...]] = (Gram,)

    def prepare(self, representation: Rows) -> Woodbury:
        """Decompose the damped Gram matrix.

        Args:
            representation: U.

        Returns:
            The factor. Costs the Gram matrix and ``R^3 / 3`` operations, :func:`wide`.
        """
        cholesky, damping = damped_cholesky(representation.gram(), self.damping)
        return Woodbury(representation, cholesky, damping)

    def apply(self, factor: Woodbury, grads: Params) -> Params:
        """``(U^T U + λ I)^-1 v`` for any vector v.

        Args:
            factor: the result of :meth:`prepare`.
            grads: v, shaped like the parameters.

        Returns:
            Shaped like the parameters, in the dtypes of ``grads``.
        """
        inverse = 1 / factor.damping
        back = factor.rows.rmatvec(-inverse * _solve(factor, factor.rows.matvec(grads)))
        return {
            k: torch.addcmul(x, grads[k].to(x.dtype), inverse.to(x.dtype)).to(grads[k].dtype)
            for k, x in back.items()
        }

    def push_through(self, factor: Woodbury, weights: Tensor, like: Params) -> Params:
        """``(U^T U + λ I)^-1 U^T y``, without cancellation.

        Args:
            factor: the result of :meth:`prepare`.
            weights: y, (R,).
            like: the parameters.

        Returns:
            Shaped like the parameters, in the dtypes of ``like``.
        """
        x = factor.rows.rmatvec(_solve(factor, weights))
        return treemath.cast(x, like)


def damped_cholesky(gram: Tensor, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """Decompose a Gram matrix plus ``λ I``, where λ is at least the rounding error of the matrix.

    Args:
        gram: the matrix, (n, n).
        damping: λ.

    Returns:
        The lower Cholesky factor and λ as it was used, both :func:`wide`.
    """
    matrix = wide((gram + gram.mT) / 2)
    floor = torch.finfo(gram.dtype).eps * matrix.diagonal().sum()
    damping = (torch.zeros_like(floor) + damping).maximum(floor)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # This does not raise: a matrix with NaN gives a factor with NaN, for skip_nonfinite.
    return torch.linalg.cholesky_ex(matrix + damping * eye)[0], damping


def _solve(factor: Woodbury, right: Tensor) -> Tensor:
    return torch.cholesky_solve(wide(right).unsqueeze(-1), factor.cholesky).squeeze(-1)
