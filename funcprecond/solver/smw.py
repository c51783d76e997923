r"""Sherman, Morrison and Woodbury: ``(U^T U + λ I)^-1`` through the small matrix ``λ I + U U^T``.

For any vector, ``x = (v - U^T (λ I + U U^T)^-1 U v) / λ``, which cancels as λ becomes small beside
``U U^T``. For a vector in the rows' span, ``v = U^T y``, the same is
``x = U^T (λ I + U U^T)^-1 y``: no division by λ and no cancellation.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.precision import wide
from funcprecond.representation.gram import Gram
from funcprecond.tree import Params, state

__all__ = ["SMW", "Woodbury"]


@state
class Woodbury:
    """A solved Gram matrix.

    Attributes:
        rows: U.
        cholesky: (R, R), lower, of ``λ I + U U^T``, :func:`wide`.
        damping: λ, 0-d, :func:`wide`.
    """

    rows: Gram
    cholesky: Tensor
    damping: Tensor


@dataclasses.dataclass(frozen=True)
class SMW:
    """The damped inverse of ``U^T U``.

    Attributes:
        damping: λ, positive. One below the rounding error of ``U U^T`` is lifted to it, the machine
            epsilon of its dtype times its trace: below that the matrix is not known.
    """

    damping: float | Tensor = 1e-2
    accepts: ClassVar[tuple[type, ...]] = (Gram,)

    def prepare(self, representation: Gram) -> Woodbury:
        """A Cholesky factor, :func:`wide`, ``R^3 / 3`` operations."""
        k = representation.gram()
        matrix = wide((k + k.mT) / 2)
        floor = torch.finfo(k.dtype).eps * matrix.diagonal().sum()
        damping = (torch.zeros_like(floor) + self.damping).maximum(floor)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        # Does not raise: a matrix with a NaN gives a factor with NaNs, on to skip_nonfinite.
        cholesky, _ = torch.linalg.cholesky_ex(matrix + damping * eye)
        return Woodbury(representation, cholesky, damping)

    def apply(self, factor: Woodbury, grads: Params) -> Params:
        """``(U^T U + λ I)^-1`` of any vector."""
        back = factor.rows.rmatvec(_solve(factor, factor.rows.matvec(grads)))
        damping = factor.damping
        return {
            k: ((g.to(back[k].dtype) - back[k]) / damping.to(back[k].dtype)).to(g.dtype)
            for k, g in grads.items()
        }

    def push_through(self, factor: Woodbury, weights: Tensor, like: Params) -> Params:
        """``(U^T U + λ I)^-1 U^T y`` for (R,) weights ``y``, in the dtypes of ``like``."""
        x = factor.rows.rmatvec(_solve(factor, weights))
        return treemath.cast(x, like)


def _solve(factor: Woodbury, right: Tensor) -> Tensor:
    return torch.cholesky_solve(wide(right).unsqueeze(-1), factor.cholesky).squeeze(-1)
