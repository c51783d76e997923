"""Symmetric linear operators on vectors shaped like the parameters, as values.

A vector is a dict of tensors shaped like the parameters; a stack of vectors has one more axis, in
front. ``C @ v`` and ``C @ V`` are all that a new operator must define; sums, multiples, products,
blocks, exact traces and norms, dense and SciPy forms and iterative solves follow from it.

Nothing here is computed before it is asked for, and no operator changes once it is made.
"""

import abc
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.solution import Solution
from funcprecond.linalg.treemath import wide_dot
from funcprecond.operators.solve import Method, solve
from funcprecond.operators.vector_stacks import (
    Partition,
    count_of,
    from_rows,
    in_chunks,
    is_stack,
    partition_of,
    stack,
    to_rows,
    unstack,
)
from funcprecond.tree import Params

__all__ = ["Operator"]

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
            return algebra.Product(self, other)
        stacked = is_stack(other, self.like)
        vector = treemath.cast(other, self.like)
        product = self.matmat(vector) if stacked else self.matvec(vector)
        return treemath.cast(product, other)

    # ------------------------------------------------------------------------------------- algebra
    def __add__(self, other: Any) -> "Operator":
        """The sum; a number or 0-d tensor stands for that multiple of the identity."""
        return algebra.Sum(self, algebra.as_operator(other, self.like))

    def __sub__(self, other: Any) -> "Operator":
        return self + (-1.0 * other)

    def __mul__(self, factor: float | Tensor) -> "Operator":
        return algebra.Multiple(self, factor)

    def __truediv__(self, factor: float | Tensor) -> "Operator":
        return algebra.Multiple(self, 1 / factor)

    def __neg__(self) -> "Operator":
        return algebra.Multiple(self, -1.0)

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

    def blocks(self, by: Partition = "layer") -> "algebra.BlockDiagonal":
        """The block-diagonal part.

        Args:
            by: "layer" for one block a module, "tensor" for one a parameter, or a mapping from
                labels to parameter names, disjoint and complete.

        Returns:
            An operator whose ``parts`` are the blocks by label.
        """
        groups = partition_of(self.like, by)
        return algebra.BlockDiagonal({label: self.block(names) for label, names in groups.items()})

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
        options |= {"damping": damping, "method": method, "precondition": precondition}
        return solve(self, b, throw=throw, **options)

    # ----------------------------------------------------------------------------------- internals
    def _block(self, names: Sequence[str]) -> "Operator":
        """A block, of names that are known."""
        return algebra.Block(self, names)

    def _columns(self) -> Iterator[Tensor]:
        """(K, P) columns, a few at a time."""
        for basis in self._basis():
            yield to_rows(self.matmat(basis), self.like)

    def _basis(self) -> Iterator[Params]:
        """The unit vectors in order, in stacks of a few."""
        size = self.size
        for start in range(0, size, COLUMNS):
            count = min(COLUMNS, size - start)
            rows = torch.zeros(count, size, **self.flat_options)
            rows.diagonal(start).fill_(1)
            yield from_rows(rows, self.like)


# Sums, products and blocks are operators themselves, so that their file needs this class.
from funcprecond.operators import algebra  # noqa: E402
