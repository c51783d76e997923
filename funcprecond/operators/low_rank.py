r"""Low rank: :math:`C = U \Theta U^T` with orthonormal columns, by Lanczos or Nyström."""

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.precision import wide
from funcprecond.operators.algebra import Function
from funcprecond.operators.operator import Operator
from funcprecond.tree import Params, state

__all__ = ["LowRank"]


@state
class LowRank(Operator):
    """``sum_i values_i u_i u_i^T`` over k orthonormal vectors. A tree of tensors, so it is saved.

    Attributes:
        values: (k,), by falling magnitude.
        vectors: (k, *shape) for each parameter.
        bounds: (k,): some eigenvalue of the matrix that was approximated is within this of each
            value; infinite where nothing is known.
    """

    values: Tensor
    vectors: Params
    bounds: Tensor

    @property
    def like(self) -> Params:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The first vector."""
        return {k: x[0] for k, x in self.vectors.items()}

    @property
    def rank(self) -> int:
        """k, the number of vectors."""
        return self.values.shape[0]

    def matvec(self, vector: Params) -> Params:
        return self._combine(self.values * self.coefficients(vector), vector)

    def coefficients(self, vector: Params) -> Tensor:
        """(k,): ``U^T v``."""
        parts = [x.flatten(1) @ vector[k].reshape(-1).to(x.dtype) for k, x in self.vectors.items()]
        return torch.stack(parts).sum(0)

    def inverse(self, damping: float | Tensor) -> Operator:
        """``(C + damping I)^-1``, for damping that makes it definite."""
        return self.power(-1.0, damping)

    def power(self, p: float, damping: float | Tensor) -> Operator:
        """``(C + damping I)^p``: ``U ((θ + λ)^p - λ^p) U^T + λ^p I``."""
        base = damping**p
        shifted = (self.values + damping) ** p - base

        def apply(vector: Params) -> Params:
            correction = self._combine(shifted * self.coefficients(vector), vector)
            return {k: base * v + correction[k] for k, v in vector.items()}

        return Function(apply, self.like)

    def preconditioner(self, damping: float | Tensor) -> Operator:
        """Nyström's preconditioner of ``A + damping I``, for a positive semi-definite C.

        ``(θ_k + λ) U (Θ + λ)^-1 U^T + (I - U U^T)``: outside of its range C is taken for its
        smallest eigenvalue, not for zero (Frangella, Tropp & Udell, arXiv 2110.02820).
        """
        scale = (self.values.min() + damping) / (self.values + damping) - 1

        def apply(vector: Params) -> Params:
            return treemath.add(vector, self._combine(scale * self.coefficients(vector), vector))

        return Function(apply, self.like)

    def logdet(self, damping: float | Tensor) -> Tensor:
        """``log det (C + damping I)``, a 0-d tensor."""
        values = wide(self.values) + damping
        rest = torch.log(torch.as_tensor(damping, dtype=values.dtype, device=values.device))
        return values.log().sum() + (self.size - self.rank) * rest

    def diagonal(self) -> Params:
        return {k: torch.tensordot(self.values, x.square(), 1) for k, x in self.vectors.items()}

    def trace(self) -> Tensor:
        return self.values.sum()

    def frobenius_norm(self) -> Tensor:
        return self.values.square().sum().sqrt()

    def to_dense(self) -> Tensor:
        rows = torch.cat([x.flatten(1) for x in self.vectors.values()], 1)
        return rows.mT @ (self.values.unsqueeze(1) * rows)

    def _combine(self, weights: Tensor, like: Params) -> Params:
        return {
            k: torch.tensordot(weights.to(x.dtype), x, 1).to(like[k].dtype)
            for k, x in self.vectors.items()
        }
