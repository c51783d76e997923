"""The two forms of a layer's block: Kronecker factors, or a diagonal in the factors' eigenbases."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from funcprecond.linalg.eigh import eigenbases, thin_eigenbasis
from funcprecond.linalg.gram import is_thin
from funcprecond.tracing import multi_tensor
from funcprecond.tree import state

__all__ = ["Factors", "Rotated", "eigen_forms"]


@state
class Factors:
    """``M -> left M right`` for (..., o, i) matrices M, or (..., J, o / J, i) for J groups.

    An (n, n) factor may be thin, that is, stored as an (r, n) matrix W with r < n. Then W stands
    for ``W^T W``, or, with a ridge, for ``(I - W^T W) / ridge``, the form of the inverse of a thin
    factor plus ``ridge`` times the identity.

    Attributes:
        left: (o, o) or (J, o / J, o / J), symmetric; (o,) if it is diagonal; or a thin factor.
        right: (i, i) or (J, i, i), symmetric; or a thin factor.
        left_ridge, right_ridge: (), or (J,) for J groups; None for a factor that is not an inverse.
    """

    left: Tensor
    right: Tensor
    left_ridge: Tensor | None = None
    right_ridge: Tensor | None = None

    def apply(self, matrix: Tensor, fresh: bool = False) -> Tensor:
        """The block times a vector.

        Args:
            matrix: the vector as a matrix M, with further axes in front.
            fresh: whether ``matrix`` may be overwritten, because the caller does not need it again.

        Returns:
            A tensor shaped like ``matrix``.
        """
        plain = multi_tensor((matrix, self.left, self.right))
        # The name is reused, so that each intermediate matrix is freed before the next is made.
        matrix = _times(matrix, self.right, self.right_ridge is not None, plain and fresh)
        matrix = _times(matrix.mT, self.left, self.left_ridge is not None, plain).mT
        sides = ((self.left, self.left_ridge), (self.right, self.right_ridge))
        ridges = [r for x, r in sides if r is not None and is_thin(x)]
        if not ridges:
            return matrix
        ridge = functools.reduce(torch.mul, ridges)[..., None, None]
        return matrix.div_(ridge) if plain else matrix / ridge

    @property
    def rows(self) -> int:
        """The number of rows of M, per group."""
        return self.left.shape[-1]

    @property
    def groups(self) -> int:
        """J, the number of groups."""
        return self.right.shape[0] if self.right.ndim == 3 else 1

    def diagonal(self) -> Tensor:
        """The diagonal of the block, (o, i) or (J, o / J, i)."""
        left = _diagonal(self.left, self.left_ridge)
        return left.unsqueeze(-1) * _diagonal(self.right, self.right_ridge).unsqueeze(-2)

    def squared_norm(self) -> Tensor:
        """The sum of the squared entries of the block."""
        left = _squared_norm(self.left, self.left_ridge)
        return (left * _squared_norm(self.right, self.right_ridge)).sum()


@state
class Rotated:
    """``M -> left (values * (left^T M right)) right^T``, the block in its eigenbases.

    The bases may be incomplete (r < o or q < i). Then the block acts on the orthogonal complement
    of the space that they span as ``rest`` times the identity.

    Attributes:
        left: (o, r) or (J, o / J, r), with orthonormal columns; None for the identity. A column may
            also be zero; the values that belong to it are equal to ``rest``.
        right: (i, q) or (J, i, q), likewise, but never None.
        values: (r, q) or (J, r, q), the eigenvalues.
        rest: a 0-d tensor, or None if both bases are complete.
    """

    left: Tensor | None
    right: Tensor
    values: Tensor
    rest: Tensor | None = None

    def apply(self, matrix: Tensor, fresh: bool = False) -> Tensor:
        """The block times a vector; ``fresh`` is ignored. See :meth:`Factors.apply`."""
        m = matrix @ self.right
        if self.left is None:
            m = (self._above() * m) @ self.right.mT
        else:
            m = self.left @ (self._above() * (self.left.mT @ m)) @ self.right.mT
        return m if self.rest is None else m + self.rest * matrix

    @property
    def rows(self) -> int:
        """The number of rows of M, per group."""
        return self.values.shape[-2] if self.left is None else self.left.shape[-2]

    @property
    def groups(self) -> int:
        """J, the number of groups."""
        return self.right.shape[0] if self.right.ndim == 3 else 1

    def diagonal(self) -> Tensor:
        """The diagonal of the block, (o, i) or (J, o / J, i)."""
        m = self._above() @ self.right.square().mT
        m = m if self.left is None else self.left.square() @ m
        return m if self.rest is None else m + self.rest

    def squared_norm(self) -> Tensor:
        """The sum of the squared entries of the block."""
        inside = self.values.square().sum()
        return inside if self.rest is None else inside + self._outside() * self.rest**2

    def logdet(self) -> Tensor:
        """The sum of the logarithms of all eigenvalues."""
        inside = self.values.log().sum()
        # If the bases are complete, the second term is 0 * log(rest), which is NaN for rest = 0.
        if self.rest is None or not self._outside():
            return inside
        return inside + self._outside() * self.rest.log()

    def map(self, function: Callable[[Tensor], Tensor]) -> "Rotated":
        """The same eigenvectors with other eigenvalues."""
        rest = None if self.rest is None else function(self.rest)
        return Rotated(self.left, self.right, function(self.values), rest)

    def _above(self) -> Tensor:
        """The eigenvalues minus ``rest``."""
        return self.values if self.rest is None else self.values - self.rest

    def _outside(self) -> int:
        """The number of eigenvalues outside of ``values``, all of which are equal to ``rest``."""
        return self.groups * self.rows * self.right.shape[-2] - self.values.numel()


def _times(x: Tensor, factor: Tensor, inverse: bool, over: bool) -> Tensor:
    """``x F`` for a factor F; times its ridge if F is a thin inverse.

    Args:
        x: (..., n).
        factor: F in one of the forms of :class:`Factors`.
        inverse: whether F has a ridge.
        over: whether x may be overwritten with the result.
    """
    if factor.ndim == 1:
        return x * factor
    if not is_thin(factor):
        return x @ factor
    if not inverse:
        return (x @ factor.mT) @ factor
    # For a single matrix, one call computes the difference without storing the product.
    if x.ndim == factor.ndim == 2:
        out = x if over else None
        return torch.addmm(x, x @ factor.mT, factor, alpha=-1, out=out)  # pyright: ignore
    return x - (x @ factor.mT) @ factor


def _diagonal(factor: Tensor, ridge: Tensor | None) -> Tensor:
    if factor.ndim == 1:
        return factor
    if not is_thin(factor):
        return factor.diagonal(dim1=-2, dim2=-1)
    diagonal = factor.square().sum(-2)
    return diagonal if ridge is None else (1 - diagonal) / ridge.unsqueeze(-1)


def _squared_norm(factor: Tensor, ridge: Tensor | None) -> Tensor:
    if not is_thin(factor):
        return factor.square().sum((-2, -1) if factor.ndim > 1 else -1)
    gram = factor @ factor.mT
    squares = gram.square().sum((-2, -1))
    if ridge is None:
        return squares
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (factor.shape[-1] - 2 * trace + squares) / ridge**2


def _square(factor: Tensor, ridge: Tensor | None) -> Tensor:
    """The dense matrix of a thin factor; any other factor is returned unchanged."""
    if not is_thin(factor):
        return factor
    product = factor.mT @ factor
    if ridge is None:
        return product
    eye = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    return (eye - product) / ridge[..., None, None]


def eigen_forms(factors: dict[str, Factors]) -> dict[str, Rotated]:
    """Convert blocks from Kronecker factors to their eigenbases.

    Factors of the same size share one batched eigendecomposition.
    """
    sides = {
        (k, side): (getattr(b, side), getattr(b, f"{side}_ridge"))
        for k, b in factors.items()
        for side in ("left", "right")
    }
    thin = {
        k: thin_eigenbasis(x) for k, (x, ridge) in sides.items() if is_thin(x) and ridge is None
    }
    values, vectors = eigenbases(
        {k: _square(*x) for k, x in sides.items() if k not in thin}  # pyright: ignore
    )
    values |= {k: x for k, (x, _) in thin.items()}
    vectors |= {k: x for k, (_, x) in thin.items()}
    found = {}
    for k in factors:
        left, right = (k, "left"), (k, "right")
        product = values[left].unsqueeze(-1) * values[right].unsqueeze(-2)
        rest = product.new_zeros(()) if left in thin or right in thin else None
        found[k] = Rotated(vectors.get(left), vectors[right], product, rest)
    return found
