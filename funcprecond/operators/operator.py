"""Symmetric linear operators on vectors shaped like the parameters, as values.

A vector is a dict of tensors shaped like the parameters; a stack of vectors has one more axis, in
front. ``C @ v`` and ``C @ V`` are all that a new operator must define; sums, multiples, products,
blocks, exact traces and norms, dense and SciPy forms and iterative solves follow from it.

Nothing here is computed before it is asked for, and no operator changes once it is made.
"""

import abc
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.conjugate_gradients import NotConverged, Solution, Stop, cg, truncated_cg
from funcprecond.linalg.minimal_residual import minres
from funcprecond.linalg.neumann_series import neumann
from funcprecond.linalg.treemath import wide_dot
from funcprecond.operators.vector_stacks import (
    Partition,
    count_of,
    in_chunks,
    is_stack,
    partition_of,
    stack,
    unstack,
)
from funcprecond.tracing import is_eager
from funcprecond.tree import Params

__all__ = ["BlockDiagonal", "Function", "Identity", "Matrix", "Operator"]

Method = Literal["direct", "cg", "minres", "truncated_cg", "neumann"]
# Columns of the identity taken at a time where a whole matrix is gone through.
COLUMNS = 32


class Operator(abc.ABC):
    """A linear operator C; symmetric unless it is a product.

    Attributes:
        like: tensors with the shapes, dtypes and devices of the vectors; their values mean nothing.
    """

    like: Params
    symmetric: bool = True

    @abc.abstractmethod
    def matvec(self, vector: Params) -> Params:
        """``C v``."""

    def matmat(self, vectors: Params, chunk_size: int | None = None) -> Params:
        """``C`` times each vector of a stack.

        Args:
            vectors: (K, *shape) for each parameter.
            chunk_size: so many columns at a time under ``vmap``; None takes one after another,
                which on a CPU is as fast or faster and keeps memory at one column's. A compiler
                unrolls what comes one after another: for many columns, a larger chunk compiles in
                a fraction of the time.

        Returns:
            (K, *shape) for each parameter.

        Raises:
            ValueError: ``chunk_size`` is not a positive int.
        """
        if chunk_size is not None:
            return in_chunks(self.matvec, vectors, chunk_size)
        return stack((self.matvec(v) for v in unstack(vectors)), count_of(vectors))

    def products(self, vectors: Params, chunk_size: int | None = None) -> Iterator[Params]:
        """``C`` times each vector of a stack, one after another; see :meth:`matmat`.

        What takes each as it comes needs no second stack in memory, where C makes them one by one.
        """
        return unstack(self.matmat(vectors, chunk_size))

    def quadratic_forms(self, vectors: Params, chunk_size: int | None = None) -> Tensor:
        """(K,) ``v · C v`` for each vector of a stack, :func:`wide`; see :meth:`matmat`.

        A product each, unless C knows how to do without: see :class:`funcprecond.GGN`.
        """
        pairs = zip(unstack(vectors), self.products(vectors, chunk_size), strict=True)
        return torch.stack([wide_dot(v, product) for v, product in pairs])

    def __matmul__(self, other: Any) -> Any:
        """``C @ v``, ``C @ V`` for a stack, or the product with another operator.

        Vectors are cast to the parameters' dtypes, and products back.

        Raises:
            ValueError: the names or shapes are not the parameters'.
        """
        if isinstance(other, Operator):
            return Product(self, other)
        stacked = is_stack(other, self.like)
        vector = treemath.cast(other, self.like)
        product = self.matmat(vector) if stacked else self.matvec(vector)
        return treemath.cast(product, other)

    # ------------------------------------------------------------------------------------- algebra
    def __add__(self, other: Any) -> "Operator":
        """The sum; a number or 0-d tensor stands for that multiple of the identity."""
        return Sum(self, _as_operator(other, self.like))

    def __sub__(self, other: Any) -> "Operator":
        return self + (-1.0 * other)

    def __mul__(self, factor: float | Tensor) -> "Operator":
        return Multiple(self, factor)

    def __truediv__(self, factor: float | Tensor) -> "Operator":
        return Multiple(self, 1 / factor)

    def __neg__(self) -> "Operator":
        return Multiple(self, -1.0)

    __radd__ = __add__
    __rmul__ = __mul__

    @property
    def transposed(self) -> "Operator":
        """``C^T``."""
        return self

    # -------------------------------------------------------------------------------------- blocks
    def block(self, names: Sequence[str]) -> "Operator":
        """The diagonal block of some parameters: an operator on vectors of these alone.

        Raises:
            ValueError: no names, or unknown ones.
        """
        unknown = [k for k in names if k not in self.like]
        if unknown or not names:
            msg = f"a block needs names of parameters: unknown {unknown or 'none'}"
            raise ValueError(msg)
        return self._block(names)

    def blocks(self, by: Partition = "layer") -> "BlockDiagonal":
        """The block-diagonal part.

        Args:
            by: "layer" for one block a module, "tensor" for one a parameter, or a mapping from
                labels to parameter names, disjoint and complete.

        Returns:
            An operator whose ``parts`` are the blocks by label.
        """
        groups = partition_of(self.like, by)
        return BlockDiagonal({label: self.block(names) for label, names in groups.items()})

    # ------------------------------------------------------------------------------------ the whole
    @property
    def size(self) -> int:
        """P, the number of rows."""
        return sum(p.numel() for p in self.like.values())

    @property
    def flat_options(self) -> dict[str, Any]:
        """``dtype``, float32 or wider, and ``device`` of vectors with all parameters in a row."""
        device = next(iter(self.like.values())).device
        dtypes = (p.dtype for p in self.like.values())
        return {
            "dtype": functools.reduce(torch.promote_types, dtypes, torch.float32),
            "device": device,
        }

    def diagonal(self) -> Params:
        """The diagonal, shaped like the parameters; exact, by P forms unless C knows better."""
        parts = [self.quadratic_forms(basis) for basis in self._basis()]
        diagonal = treemath.unravel(torch.cat(parts), self.like)
        return treemath.cast(diagonal, self.like)

    def trace(self) -> Tensor:
        """The trace, a 0-d tensor; exact, from :meth:`diagonal`."""
        return treemath.ravel(self.diagonal()).sum()

    def frobenius_norm(self) -> Tensor:
        """The root of the sum of all squared entries, a 0-d tensor; exact, by P products."""
        return torch.stack([c.square().sum() for c in self._columns()]).sum().sqrt()

    def to_dense(self) -> Tensor:
        """(P, P), all parameters in order; P products unless C knows better."""
        return torch.cat(list(self._columns())).mT

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` on flat NumPy vectors, on the CPU."""
        from scipy.sparse.linalg import LinearOperator

        wide, device = self.flat_options["dtype"], self.flat_options["device"]

        def through(operator: Operator) -> Callable:
            def apply(x):
                rows = torch.as_tensor(x.T.copy()).to(device, wide)
                if rows.ndim == 1 or len(rows) == 1:
                    product = operator @ treemath.unravel(rows.reshape(-1), self.like)
                    return treemath.ravel(product).to("cpu", wide).numpy().reshape(x.shape)
                vectors = [treemath.unravel(row, self.like) for row in rows]
                product = operator @ stack(vectors)
                return torch.stack([treemath.ravel(v) for v in unstack(product)]).cpu().numpy().T

            return apply

        dtype = torch.empty(0, dtype=wide).numpy().dtype
        forward, backward = through(self), through(self.transposed)
        products = {"matvec": forward, "matmat": forward, "rmatvec": backward, "rmatmat": backward}
        return LinearOperator(dtype=dtype, shape=(self.size, self.size), **products)

    # --------------------------------------------------------------------------------------- solve
    def solve(
        self,
        b: Params,
        *,
        damping: float | Tensor = 0.0,
        method: Method | None = None,
        precondition: "Operator | Callable[[Params], Params] | None" = None,
        throw: bool = True,
        **options: Any,
    ) -> Solution:
        """``(C + damping I)^-1 b``.

        Args:
            b: the right-hand side.
            damping: added to C.
            method: "direct" where C has an ``inverse``, the default there; "cg", the default else,
                for positive definite, "minres" for any symmetric C, "truncated_cg" within a trust
                region, "neumann" for a fixed number of terms.
            precondition: an operator or function ``r -> M^-1 r``, such as the inverse of a
                :class:`funcprecond.KroneckerFactored` (not for "truncated_cg").
            throw: raise if the residual did not reach ``tol``. Where a transform or a compiler
                watches, nothing is raised: read ``reason``.
            **options: of :func:`cg`, :func:`minres`, :func:`truncated_cg` or :func:`neumann`.

        Raises:
            NotConverged: see ``throw``; it has the result.
        """
        if not self.symmetric:
            msg = "solve needs a symmetric operator; this one is a product: solve factor by factor"
            raise TypeError(msg)
        damped = self if isinstance(damping, float) and damping == 0.0 else self + damping
        if precondition is not None:
            options["precondition"] = as_function(precondition)
        if method is None:
            method = "direct" if hasattr(self, "inverse") else "cg"
        if method == "direct":
            found = self._direct(damped, b, damping)
        elif method == "cg":
            found = cg(damped.matvec, b, **{"rule": "none", **options})
        elif method == "minres":
            found = minres(damped.matvec, b, **options)
        elif method == "truncated_cg":
            found = truncated_cg(damped.matvec, b, **options)
        elif method == "neumann":
            found = neumann(damped.matvec, b, **options)
        else:
            msg = f"method must be one of {Method.__args__}, not {method!r}"
            raise ValueError(msg)
        solution = Solution(found.solution, found.residual, found.iterations, found.reason)
        fine = (Stop.RESIDUAL, Stop.BOUNDARY) if method == "truncated_cg" else (Stop.RESIDUAL,)
        if throw and is_eager((b, found.solution)) and int(found.reason) not in fine:
            raise NotConverged(solution, b)
        return solution

    # ----------------------------------------------------------------------------------- internals
    def _block(self, names: Sequence[str]) -> "Operator":
        """A block, of names that are known."""
        return Block(self, names)

    def _direct(self, damped: "Operator", b: Params, damping: float | Tensor) -> Solution:
        if not hasattr(self, "inverse"):
            msg = f"{type(self).__name__} has no inverse: use method='cg' or 'minres'"
            raise ValueError(msg)
        inverse = self.inverse(damping)  # pyright: ignore[reportAttributeAccessIssue]
        x = inverse @ b
        residual = treemath.sub(b, damped @ x)
        finite = torch.isfinite(treemath.norm(residual))
        zero = torch.zeros_like(finite, dtype=torch.int64)
        reason = torch.where(finite, zero + Stop.RESIDUAL.value, zero + Stop.NOT_FINITE.value)
        return Solution(x, residual, zero, reason)

    def _columns(self) -> Iterator[Tensor]:
        """(K, P) columns, a few at a time."""
        for basis in self._basis():
            product, count = self.matmat(basis), count_of(basis)
            yield torch.cat([product[k].reshape(count, -1) for k in self.like], 1)

    def _basis(self) -> Iterator[Params]:
        """The unit vectors in order, in stacks of a few."""
        size = self.size
        for start in range(0, size, COLUMNS):
            count = min(COLUMNS, size - start)
            rows = torch.zeros(count, size, **self.flat_options)
            rows.diagonal(start).fill_(1)
            parts = rows.split([p.numel() for p in self.like.values()], 1)
            yield {
                k: x.reshape(count, *p.shape).to(p.dtype)
                for (k, p), x in zip(self.like.items(), parts, strict=True)
            }


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


def as_function(operator: "Operator | Callable[[Params], Params]") -> Callable[[Params], Params]:
    """``v -> C v`` of an operator; a function as it is."""
    return operator.matvec if isinstance(operator, Operator) else operator


def _as_operator(other: Any, like: Params) -> Operator:
    return other if isinstance(other, Operator) else Identity(like, other)


def _same_space(a: Operator, b: Operator) -> None:
    left = {k: tuple(p.shape) for k, p in a.like.items()}
    right = {k: tuple(p.shape) for k, p in b.like.items()}
    if left != right:
        msg = f"the operators act on different vectors: {left} and {right}"
        raise ValueError(msg)
