"""Operators with a block for each layer: Kronecker factors, or a diagonal in their eigenbases."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcprecond.layers.block_matrix import join, split
from funcprecond.layers.blocks import split_block
from funcprecond.linalg.eigh import eigenbases
from funcprecond.linalg.gram import is_thin
from funcprecond.linalg.precision import wide, wide_dtype
from funcprecond.operators.operator import Operator
from funcprecond.tracing import multi_tensor
from funcprecond.tree import Params, state

__all__ = ["Factors", "Layerwise", "Rotated"]


@state
class Factors:
    """``M -> left M right`` of (..., o, i) matrices, or (..., J, o / J, i) for J groups.

    A factor of n rows and columns may also be kept as fewer rows: (r, n) rows W stand for ``W^T
    W``, or with a ridge for ``(I - W^T W) / ridge``, which is what an inverse of the former is.

    Attributes:
        left: (o, o) or (J, o / J, o / J), symmetric; (o,) if it is diagonal; or rows.
        right: (i, i) or (J, i, i), symmetric; or rows.
        left_ridge, right_ridge: (), or (J,) for groups; None for a factor that is no inverse.
    """

    left: Tensor
    right: Tensor
    left_ridge: Tensor | None = None
    right_ridge: Tensor | None = None

    def apply(self, matrix: Tensor, fresh: bool = False) -> Tensor:
        """The block times a vector; a ``fresh`` one, of no other use, may be written over."""
        plain = multi_tensor((matrix, self.left, self.right))
        # One name, so that what a side was multiplied by is gone before the next one is.
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
        """How many rows the matrix has, in each group."""
        return self.left.shape[-1]

    @property
    def groups(self) -> int:
        """J."""
        return self.right.shape[0] if self.right.ndim == 3 else 1

    def diagonal(self) -> Tensor:
        """(o, i) or (J, o / J, i)."""
        left = _diagonal(self.left, self.left_ridge)
        return left.unsqueeze(-1) * _diagonal(self.right, self.right_ridge).unsqueeze(-2)

    def squared_norm(self) -> Tensor:
        """The sum of the squared entries."""
        left = _squared_norm(self.left, self.left_ridge)
        return (left * _squared_norm(self.right, self.right_ridge)).sum()


@state
class Rotated:
    """``M -> left (values * (left^T M right)) right^T``.

    The bases may be thin: outside of the space that they span, the block is ``rest`` times the
    identity.

    Attributes:
        left: (o, r) or (J, o / J, r), orthonormal columns, some of which may be zero, with ``rest``
            as their value; None for the identity.
        right: (i, q) or (J, i, q), likewise.
        values: (r, q) or (J, r, q), the eigenvalues.
        rest: 0-d, or None if both bases are complete.
    """

    left: Tensor | None
    right: Tensor
    values: Tensor
    rest: Tensor | None = None

    def apply(self, matrix: Tensor, fresh: bool = False) -> Tensor:
        """The block times a vector."""
        m = matrix @ self.right
        if self.left is None:
            m = (self._above() * m) @ self.right.mT
        else:
            m = self.left @ (self._above() * (self.left.mT @ m)) @ self.right.mT
        return m if self.rest is None else m + self.rest * matrix

    @property
    def rows(self) -> int:
        """How many rows the matrix has, in each group."""
        return self.values.shape[-2] if self.left is None else self.left.shape[-2]

    @property
    def groups(self) -> int:
        """J."""
        return self.right.shape[0] if self.right.ndim == 3 else 1

    def diagonal(self) -> Tensor:
        """(o, i) or (J, o / J, i)."""
        m = self._above() @ self.right.square().mT
        m = m if self.left is None else self.left.square() @ m
        return m if self.rest is None else m + self.rest

    def squared_norm(self) -> Tensor:
        """The sum of the squared entries."""
        inside = self.values.square().sum()
        return inside if self.rest is None else inside + self._outside() * self.rest**2

    def logdet(self) -> Tensor:
        """The sum of the eigenvalues' logarithms."""
        inside = self.values.log().sum()
        # Zero times the logarithm of a zero is zero here: complete bases have no outside.
        if self.rest is None or not self._outside():
            return inside
        return inside + self._outside() * self.rest.log()

    def map(self, function: Callable[[Tensor], Tensor]) -> "Rotated":
        """The same eigenvectors with other eigenvalues."""
        rest = None if self.rest is None else function(self.rest)
        return Rotated(self.left, self.right, function(self.values), rest)

    def _above(self) -> Tensor:
        return self.values if self.rest is None else self.values - self.rest

    def _outside(self) -> int:
        """The number of eigenvalues that are ``rest``, but for those among the values."""
        return self.groups * self.rows * self.right.shape[-2] - self.values.numel()


def _times(x: Tensor, factor: Tensor, inverse: bool, over: bool) -> Tensor:
    """``x F`` for rows x, times the ridge if F is an inverse kept as rows; maybe written over x."""
    if factor.ndim == 1:
        return x * factor
    if not is_thin(factor):
        return x @ factor
    if not inverse:
        return (x @ factor.mT) @ factor
    # Of one matrix in one call, without the product in memory beside the difference.
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
    """The factor itself, formed; a diagonal as it is."""
    if not is_thin(factor):
        return factor
    product = factor.mT @ factor
    if ridge is None:
        return product
    eye = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    return (eye - product) / ridge[..., None, None]


def _thin_basis(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues (..., r), eigenvectors (..., n, r)) of ``rows^T rows``.

    A direction whose eigenvalue is rounding beside the largest is given the zero vector and value.
    """
    if rows.dtype == wide_dtype(rows):
        _, s, vectors = torch.linalg.svd(rows, full_matrices=False)
        values, vectors = s**2, vectors.mT
        limit = 2000 * torch.finfo(rows.dtype).eps ** 2
    else:
        # What float32 rows lose by squaring, float64 has to spare.
        x = wide(rows)
        values, q = torch.linalg.eigh(x @ x.mT)
        values = values.clamp_min(0.0)
        vectors = x.mT @ q
        vectors = vectors / torch.where(values > 0, values, 1.0).sqrt().unsqueeze(-2)
        limit = 1e-9
    kept = values > limit * values.amax(-1, keepdim=True)
    values = torch.where(kept, values, 0.0)
    vectors = torch.where(kept.unsqueeze(-2), vectors, 0.0)
    return values.to(rows.dtype), vectors.to(rows.dtype)


class Layerwise(Operator):
    """A block for each layer, in one of two forms.

    Attributes:
        layers: by ``"weight+bias"`` or ``"weight"``, on ``[W | b]``.
        units: (U, 2, 2) or (U, 1, 1) blocks of norm layers.
        others: the diagonal of what no layer covers.
    """

    def __init__(
        self,
        like: Params,
        layers: dict[str, Any],
        units: dict[str, Tensor],
        others: dict[str, Tensor],
    ):
        self.like, self.layers, self.units, self.others = like, layers, units, others

    def matvec(self, vector: Params) -> Params:
        found: Params = {}
        for name, block in self.layers.items():
            weight, bias = split_block(name)
            lead = tuple(vector[weight].shape[: vector[weight].ndim - self.like[weight].ndim])
            matrix = join(vector, self.like, name, block.rows, block.groups)
            # With a bias it is a new matrix, of no other use.
            product = block.apply(matrix.to(block.right.dtype), fresh=bias is not None)
            found |= split(product, self.like, name, lead)
        for name, matrices in self.units.items():
            parts = [k for k in split_block(name) if k]
            lead = vector[parts[0]].ndim - self.like[parts[0]].ndim
            stacked = torch.stack([vector[k].flatten(lead) for k in parts], -1)
            solved = torch.einsum("upq,...uq->...up", matrices, stacked.to(matrices.dtype))
            found |= {k: solved[..., j].reshape(vector[k].shape) for j, k in enumerate(parts)}
        found |= {k: vector[k] * d for k, d in self.others.items()}
        return {k: found[k].to(v.dtype) if k in found else 0 * v for k, v in vector.items()}

    def matmat(self, vectors: Params, chunk_size: int | None = None) -> Params:
        # Every product takes leading axes: all columns are one matrix product.
        return self.matvec(vectors)

    def _block(self, names: Sequence[str]) -> Operator:
        chosen, like = set(names), {k: self.like[k] for k in names}

        def within(blocks):
            kept = {}
            for name, block in blocks.items():
                parts = {k for k in split_block(name) if k}
                if parts <= chosen:
                    kept[name] = block
                elif parts & chosen:
                    return None
            return kept

        blocks, units = within(self.layers), within(self.units)
        if blocks is None or units is None:
            # Part of a layer only.
            return super()._block(names)
        others = {k: d for k, d in self.others.items() if k in chosen}
        return Layerwise(like, blocks, units, others)

    def diagonal(self) -> Params:
        found: Params = {}
        for name, block in self.layers.items():
            found |= split(block.diagonal(), self.like, name)
        for name, matrices in self.units.items():
            for j, k in enumerate(k for k in split_block(name) if k):
                found[k] = matrices[:, j, j].reshape(self.like[k].shape)
        found |= self.others
        return {k: found[k] if k in found else torch.zeros_like(p) for k, p in self.like.items()}

    def frobenius_norm(self) -> Tensor:
        parts = [block.squared_norm() for block in self.layers.values()]
        parts += [x.square().sum() for x in (*self.units.values(), *self.others.values())]
        return torch.stack(parts).sum().sqrt()

    def power(self, p: float, damping: float | Tensor = 0.0) -> "Layerwise":
        """``(C + damping I)^p``, exactly, by the factors' eigendecompositions."""

        def raised(x: Tensor) -> Tensor:
            return (x.clamp_min(0.0) + damping) ** p

        def unit(x: Tensor) -> Tensor:
            values, vectors = torch.linalg.eigh(x)
            return vectors @ (raised(values).unsqueeze(-1) * vectors.mT)

        return Layerwise(
            self.like,
            {k: b.map(raised) for k, b in self._rotated().items()},
            {k: unit(x) for k, x in self.units.items()},
            {k: raised(d) for k, d in self._rest().items()},
        )

    def inverse(self, damping: float | Tensor) -> "Layerwise":
        """``(C + damping I)^-1``, exactly."""
        return self.power(-1.0, damping)

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """``log det (C + damping I)``, a 0-d tensor; exact."""

        def damped(x: Tensor) -> Tensor:
            return x.clamp_min(0.0) + damping

        parts = [b.map(damped).logdet() for b in self._rotated().values()]
        values = [torch.linalg.eigvalsh(x) for x in self.units.values()]
        values += list(self._rest().values())
        return torch.stack([*parts, *(damped(x).log().sum() for x in values)]).sum()

    def _rest(self) -> dict[str, Tensor]:
        """The diagonal of what has no block; zero for what the loss does not depend on."""
        covered = {k for name in (*self.layers, *self.units) for k in split_block(name) if k}
        rest = {k: p for k, p in self.like.items() if k not in covered}
        return {k: self.others.get(k, torch.zeros_like(p)) for k, p in rest.items()}

    def _rotated(self) -> dict[str, Rotated]:
        """All blocks in their eigenbases: one batched decomposition for each size."""
        found = {k: b for k, b in self.layers.items() if isinstance(b, Rotated)}
        factors = {k: b for k, b in self.layers.items() if isinstance(b, Factors)}
        sides = {
            (k, side): (getattr(b, side), getattr(b, f"{side}_ridge"))
            for k, b in factors.items()
            for side in ("left", "right")
        }
        thin = {
            k: _thin_basis(x) for k, (x, ridge) in sides.items() if is_thin(x) and ridge is None
        }
        values, vectors = eigenbases(
            {k: _square(*x) for k, x in sides.items() if k not in thin}  # pyright: ignore
        )
        values |= {k: x for k, (x, _) in thin.items()}
        vectors |= {k: x for k, (_, x) in thin.items()}
        for k in factors:
            left, right = (k, "left"), (k, "right")
            product = values[left].unsqueeze(-1) * values[right].unsqueeze(-2)
            rest = product.new_zeros(()) if left in thin or right in thin else None
            found[k] = Rotated(vectors.get(left), vectors[right], product, rest)
        return {k: found[k] for k in self.layers}
