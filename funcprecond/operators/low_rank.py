r"""Low-rank matrices :math:`C = U \Theta U^T`, as the Lanczos and Nyström methods compute them."""

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
    """The matrix ``C = U diag(θ) U^T`` with k orthonormal columns in U and k values in θ.

    It is a tree of tensors, so :func:`funcprecond.save` can store it.

    Attributes:
        values: θ, (k,).
        vectors: the columns of U, (k, *shape) for each parameter.
        bounds: (k,), error bounds: the matrix that C approximates has an eigenvalue within
            ``bounds[i]`` of ``values[i]``. Infinite where no bound is known.

    Example:
        >>> import torch, funcprecond as fp
        >>> vectors = {"w": torch.tensor([[1.0, 0.0]])}
        >>> c = fp.LowRank(torch.tensor([3.0]), vectors, torch.zeros(1))
        >>> c.inverse(damping=1.0) @ {"w": torch.tensor([4.0, 4.0])}
        {'w': tensor([1., 4.])}
    """

    values: Tensor
    vectors: Params
    bounds: Tensor

    @property
    def like(self) -> Params:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The first column of U, for its shapes."""
        return {k: x[0] for k, x in self.vectors.items()}

    @property
    def rank(self) -> int:
        """k, the number of columns of U."""
        return self.values.shape[0]

    def matvec(self, vector: Params) -> Params:
        return self._combine(self.values * self.coefficients(vector), vector)

    def coefficients(self, vector: Params) -> Tensor:
        """``U^T v``.

        Args:
            vector: v, shaped like the parameters.

        Returns:
            (k,).
        """
        parts = [x.flatten(1) @ vector[k].reshape(-1).to(x.dtype) for k, x in self.vectors.items()]
        return torch.stack(parts).sum(0)

    def inverse(self, damping: float | Tensor) -> Operator:
        """``(C + damping I)^-1``.

        Args:
            damping: the multiple of the identity that is added to C. It must not be zero, and
                ``C + damping I`` must be invertible.

        Returns:
            An operator. A product costs about 4kP operations.

        Raises:
            ValueError: ``damping`` is the number 0, and the rank k is less than P.
        """
        if not isinstance(damping, Tensor) and damping == 0 and self.rank < self.size:
            msg = (
                f"damping must not be 0: a matrix of rank {self.rank} with {self.size} rows has no "
                "inverse, so add a multiple of the identity, such as damping=1e-3"
            )
            raise ValueError(msg)
        return self.power(-1.0, damping)

    def power(self, p: float, damping: float | Tensor) -> Operator:
        """``(C + λ I)^p = U ((θ + λ)^p - λ^p) U^T + λ^p I``.

        Args:
            p: the exponent.
            damping: λ.

        Returns:
            An operator. A product costs about 4kP operations.
        """
        base = damping**p
        shifted = (self.values + damping) ** p - base

        def apply(vector: Params) -> Params:
            correction = self._combine(shifted * self.coefficients(vector), vector)
            return {k: base * v + correction[k] for k, v in vector.items()}

        return Function(apply, self.like)

    def preconditioner(self, damping: float | Tensor) -> Operator:
        """The Nyström preconditioner of ``A + λ I``, where C approximates A.

        It is ``M^-1 = (θ_k + λ) U diag(1 / (θ + λ)) U^T + (I - U U^T)``, where θ_k is the smallest
        value. Beyond the span of U's columns, the eigenvalues of A are taken to be θ_k instead of
        zero (Frangella, Tropp & Udell, arXiv 2110.02820).

        Args:
            damping: λ.

        Returns:
            An operator, for the argument ``precondition`` of :meth:`Operator.solve`. C must be
            positive semi-definite. A product costs about 4kP operations.
        """
        scale = (self.values.min() + damping) / (self.values + damping) - 1

        def apply(vector: Params) -> Params:
            return treemath.add(vector, self._combine(scale * self.coefficients(vector), vector))

        return Function(apply, self.like)

    def logdet(self, damping: float | Tensor) -> Tensor:
        """``log det (C + damping I)``.

        Args:
            damping: the multiple of the identity that is added to C, positive.

        Returns:
            A 0-d tensor.
        """
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
