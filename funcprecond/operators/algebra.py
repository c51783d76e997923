"""Operators that are made of others: sums, multiples, products, blocks; and the simplest ones."""

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
    """``factor`` times the identity."""

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
    """``A + B``."""

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
    """``factor A``; the factor is a float or a 0-d tensor."""

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
    """``A B``: not symmetric, so that it cannot be solved with."""

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
    """The diagonal block of some parameters; a product costs one of the whole."""

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
        """A stack of vectors of the whole, zero beyond the block."""
        count = count_of(vectors)
        return {
            k: vectors[k] if k in vectors else p.new_zeros(()).expand(count, *p.shape)
            for k, p in self._others()
        }

    def _others(self):
        return self.whole.like.items()


class BlockDiagonal(Operator):
    """Operators on disjoint sets of parameters, side by side.

    Attributes:
        parts: the blocks, by label.
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
    """A dense symmetric matrix.

    Attributes:
        matrix: (P, P), in the order of ``like``.
    """

    def __init__(self, matrix: Tensor, like: Params):
        self.matrix, self.like = matrix, like

    def matvec(self, vector: Params) -> Params:
        flat = treemath.ravel({k: vector[k] for k in self.like})
        return treemath.unravel(self.matrix @ flat.to(self.matrix.dtype), self.like)

    def diagonal(self) -> Params:
        return treemath.unravel(self.matrix.diagonal(), self.like)

    def to_dense(self) -> Tensor:
        return self.matrix


class Function(Operator):
    """Any function ``v -> C v`` of a vector, linear and symmetric: nothing checks it."""

    def __init__(self, function: Callable[[Params], Params], like: Params):
        self.function, self.like = function, like

    def matvec(self, vector: Params) -> Params:
        return self.function(vector)


def as_operator(other: Any, like: Params) -> Operator:
    """An operator as it is; a number or 0-d tensor as that multiple of the identity."""
    return other if isinstance(other, Operator) else Identity(like, other)


def _same_space(a: Operator, b: Operator) -> None:
    left = {k: tuple(p.shape) for k, p in a.like.items()}
    right = {k: tuple(p.shape) for k, p in b.like.items()}
    if left != right:
        msg = f"the operators act on different vectors: {left} and {right}"
        raise ValueError(msg)
