"""Operators built from other operators (sums, multiples, products, blocks), and elementary ones."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.operators.operator import Operator
from funcprecond.operators.vector_stacks import count_of
from funcprecond.tree import Params

__all__ = [
    "Block",
    "BlockDiagonal",
    "Function",
    "Identity",
    "Matrix",
    "Multiple",
    "Product",
    "Sum",
    "as_operator",
]


class Identity(Operator):
    """``factor`` times the identity.

    Args:
        like: tensors with the shapes, dtypes and devices of the vectors.
        factor: a float or a 0-d tensor.
    """

    def __init__(self, like: Params, factor: float | Tensor = 1.0):
        self.like = like
        self.factor = factor

    def matvec(self, vector: Params) -> Params:
        return treemath.mul(vector, self.factor)

    def _block(self, names: Sequence[str]) -> Operator:
        return Identity({k: self.like[k] for k in names}, self.factor)

    def diagonal(self) -> Params:
        return {k: torch.ones_like(p) * self.factor for k, p in self.like.items()}

    def frobenius_norm(self) -> Tensor:
        like = next(iter(self.like.values()))
        return (like.new_ones(()) * self.factor).abs() * math.sqrt(self.size)


class Sum(Operator):
    """``A + B``.

    Args:
        a, b: two operators on vectors of the same names and shapes.

    Attributes:
        terms: the two operators.

    Raises:
        ValueError: the operators act on vectors of different names or shapes.
    """

    def __init__(self, a: Operator, b: Operator):
        _same_space(a, b)
        self.like, self.terms = a.like, (a, b)
        self.symmetric = a.symmetric and b.symmetric

    def matvec(self, vector: Params) -> Params:
        a, b = self.terms
        return treemath.add(a.matvec(vector), b.matvec(vector))

    def matmat(self, vectors: Params, chunk_size: int | None = None) -> Params:
        a, b = (t.matmat(vectors, chunk_size) for t in self.terms)
        return treemath.add(a, b)

    def quadratic_forms(self, vectors: Params, chunk_size: int | None = None) -> Tensor:
        a, b = (t.quadratic_forms(vectors, chunk_size) for t in self.terms)
        return a + b

    @property
    def transposed(self) -> Operator:
        return Sum(*(t.transposed for t in self.terms))

    def _block(self, names: Sequence[str]) -> Operator:
        return Sum(*(t.block(names) for t in self.terms))

    def diagonal(self) -> Params:
        a, b = self.terms
        return treemath.add(a.diagonal(), b.diagonal())

    def trace(self) -> Tensor:
        a, b = self.terms
        return a.trace() + b.trace()


class Multiple(Operator):
    """``factor A``.

    Args:
        a: an operator.
        factor: a float or a 0-d tensor.
    """

    def __init__(self, a: Operator, factor: float | Tensor):
        self.like, self.a, self.factor = a.like, a, factor
        self.symmetric = a.symmetric

    def matvec(self, vector: Params) -> Params:
        return treemath.mul(self.a.matvec(vector), self.factor)

    def matmat(self, vectors: Params, chunk_size: int | None = None) -> Params:
        return treemath.mul(self.a.matmat(vectors, chunk_size), self.factor)

    def quadratic_forms(self, vectors: Params, chunk_size: int | None = None) -> Tensor:
        return self.a.quadratic_forms(vectors, chunk_size) * self.factor

    @property
    def transposed(self) -> Operator:
        return Multiple(self.a.transposed, self.factor)

    def _block(self, names: Sequence[str]) -> Operator:
        return Multiple(self.a.block(names), self.factor)

    def diagonal(self) -> Params:
        return treemath.mul(self.a.diagonal(), self.factor)

    def trace(self) -> Tensor:
        return self.a.trace() * self.factor

    def frobenius_norm(self) -> Tensor:
        return self.a.frobenius_norm() * abs(self.factor)


class Product(Operator):
    """``A B``, which is not symmetric in general, so that :meth:`Operator.solve` refuses it.

    Args:
        a, b: two operators on vectors of the same names and shapes.

    Raises:
        ValueError: the operators act on vectors of different names or shapes.
    """

    symmetric = False

    def __init__(self, a: Operator, b: Operator):
        _same_space(a, b)
        self.like, self.a, self.b = a.like, a, b

    def matvec(self, vector: Params) -> Params:
        return self.a.matvec(self.b.matvec(vector))

    def matmat(self, vectors: Params, chunk_size: int | None = None) -> Params:
        return self.a.matmat(self.b.matmat(vectors, chunk_size), chunk_size)

    @property
    def transposed(self) -> Operator:
        return Product(self.b.transposed, self.a.transposed)


class Block(Operator):
    """The diagonal block that belongs to some of the parameters.

    A product costs one product of the whole operator.

    Args:
        whole: the operator.
        names: the names of the parameters of the block.
    """

    def __init__(self, whole: Operator, names: Sequence[str]):
        self.whole, self.symmetric = whole, whole.symmetric
        self.like = {k: whole.like[k] for k in names}

    def matvec(self, vector: Params) -> Params:
        whole = {k: vector[k] if k in vector else torch.zeros_like(p) for k, p in self._others()}
        product = self.whole.matvec(whole)
        return {k: product[k] for k in vector}

    def matmat(self, vectors: Params, chunk_size: int | None = None) -> Params:
        product = self.whole.matmat(self._within(vectors), chunk_size)
        return {k: product[k] for k in vectors}

    def quadratic_forms(self, vectors: Params, chunk_size: int | None = None) -> Tensor:
        return self.whole.quadratic_forms(self._within(vectors), chunk_size)

    @property
    def transposed(self) -> Operator:
        return Block(self.whole.transposed, tuple(self.like))

    def _block(self, names: Sequence[str]) -> Operator:
        return self.whole.block(names)

    def _within(self, vectors: Params) -> Params:
        """Vectors of the block as vectors of the whole operator, zero outside of the block."""
        count = count_of(vectors)
        return {
            k: vectors[k] if k in vectors else p.new_zeros(()).expand(count, *p.shape)
            for k, p in self._others()
        }

    def _others(self):
        return self.whole.like.items()


class BlockDiagonal(Operator):
    """A block-diagonal matrix, made of operators on disjoint sets of parameters.

    Args:
        parts: an operator for each label.

    Attributes:
        parts: the blocks, by label.

    Example:
        >>> import torch, funcprecond as fp
        >>> a = fp.operators.Identity({"a": torch.zeros(1)}, 2.0)
        >>> b = fp.operators.Identity({"b": torch.zeros(1)}, 3.0)
        >>> fp.operators.BlockDiagonal({"first": a, "second": b}).to_dense()
        tensor([[2., 0.],
                [0., 3.]])
    """

    def __init__(self, parts: Mapping[str, Operator]):
        self.parts = dict(parts)
        self.like = {k: p for part in self.parts.values() for k, p in part.like.items()}
        self.symmetric = all(part.symmetric for part in self.parts.values())

    def matvec(self, vector: Params) -> Params:
        return self._each(lambda part, v: part.matvec(v), vector)

    def matmat(self, vectors: Params, chunk_size: int | None = None) -> Params:
        return self._each(lambda part, v: part.matmat(v, chunk_size), vectors)

    def quadratic_forms(self, vectors: Params, chunk_size: int | None = None) -> Tensor:
        each = [
            part.quadratic_forms({k: vectors[k] for k in part.like}, chunk_size)
            for part in self.parts.values()
        ]
        return torch.stack(each).sum(0)

    @property
    def transposed(self) -> Operator:
        return BlockDiagonal({label: part.transposed for label, part in self.parts.items()})

    def diagonal(self) -> Params:
        return {k: d for part in self.parts.values() for k, d in part.diagonal().items()}

    def frobenius_norm(self) -> Tensor:
        norms = [part.frobenius_norm().square() for part in self.parts.values()]
        return torch.stack(norms).sum().sqrt()

    def to_dense(self) -> Tensor:
        return torch.block_diag(*(part.to_dense() for part in self.parts.values()))

    def _each(self, apply: Callable, vector: Params) -> Params:
        found: Params = {}
        for part in self.parts.values():
            found |= apply(part, {k: vector[k] for k in part.like})
        return {k: found[k] for k in vector}


class Matrix(Operator):
    """A dense symmetric matrix; its symmetry is not checked.

    A product is computed in the wider dtype of the matrix and the vector, and has the dtype of the
    vector, as that of every operator.

    Args:
        matrix: (P, P), with the entries of the parameters in the order of ``like``.
        like: tensors with the shapes, dtypes and devices of the vectors.
    """

    def __init__(self, matrix: Tensor, like: Params):
        self.matrix, self.like = matrix, like

    def matvec(self, vector: Params) -> Params:
        flat = treemath.ravel({k: vector[k] for k in self.like})
        dtype = torch.promote_types(flat.dtype, self.matrix.dtype)
        product = self.matrix.to(dtype) @ flat.to(dtype)
        return treemath.cast(treemath.unravel(product, self.like), vector)

    def diagonal(self) -> Params:
        return treemath.cast(treemath.unravel(self.matrix.diagonal(), self.like), self.like)

    def to_dense(self) -> Tensor:
        return self.matrix


class Function(Operator):
    """The matrix of a function ``v -> C v``.

    Args:
        function: maps a vector to a vector of the same shapes. It must be linear and symmetric,
            which is not checked.
        like: tensors with the shapes, dtypes and devices of the vectors.

    Example:
        >>> import torch, funcprecond as fp
        >>> c = fp.operators.Function(lambda v: {"w": 2 * v["w"]}, {"w": torch.zeros(3)})
        >>> c.trace()
        tensor(6.)
    """

    def __init__(self, function: Callable[[Params], Params], like: Params):
        self.function, self.like = function, like

    def matvec(self, vector: Params) -> Params:
        return self.function(vector)


def as_operator(other: Any, like: Params) -> Operator:
    """Convert a number to a multiple of the identity, and leave an operator unchanged.

    Args:
        other: an operator, a number or a 0-d tensor.
        like: tensors with the shapes, dtypes and devices of the vectors, for the identity.

    Returns:
        ``other`` itself if it is an operator, otherwise ``other`` times the identity.

    Example:
        >>> import torch, funcprecond as fp
        >>> fp.operators.as_operator(0.5, {"w": torch.zeros(2)}).to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    return other if isinstance(other, Operator) else Identity(like, other)


def _same_space(a: Operator, b: Operator) -> None:
    left = {k: tuple(p.shape) for k, p in a.like.items()}
    right = {k: tuple(p.shape) for k, p in b.like.items()}
    if left != right:
        msg = (
            "the operators act on different vectors, so they cannot be added or multiplied: their "
            f"shapes are {left} and {right}"
        )
        raise ValueError(msg)
