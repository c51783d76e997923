"""The base class of the linear operators on vectors shaped like the parameters.

A vector is a dict of tensors with the names and shapes of the parameters. A stack of K vectors has
the same names, and each of its tensors has an additional first axis of length K.

A new operator only has to define ``C v`` (:meth:`Operator.matvec`). Sums, multiples, products,
blocks, exact traces and norms, dense and SciPy forms, and iterative solves are derived from it.
They are lazy: they compute nothing until a value is requested. Operators are never modified after
they are made.
"""

import abc
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from funcprecond.checks import listed
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

# How many columns of the identity are multiplied at a time when a whole matrix is computed.
COLUMNS = 32


class Operator(abc.ABC):
    """A linear operator C on vectors shaped like the parameters, with P rows and columns.

    ``A + B``, ``A - B``, ``2 * A``, ``A / 2``, ``-A`` and ``A @ B`` are operators again. A number
    in a sum stands for that multiple of the identity: ``C + 0.1`` is ``C + 0.1 I``. Products are
    ``C @ v``; under ``torch.compile``, which cannot trace the operator ``@`` of a class, they are
    ``C.matvec(v)`` and ``C.matmat(stack)``.

    Attributes:
        like: tensors with the shapes, dtypes and devices of the vectors; their values are not used.
        symmetric: whether C is symmetric. Every operator is, except for products of operators and
            for what is built from such products.

    Example:
        >>> import torch, funcprecond as fp
        >>> like = {"w": torch.zeros(2)}
        >>> c = fp.operators.Matrix(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), like)
        >>> (c + 0.5) @ {"w": torch.tensor([1.0, 0.0])}
        {'w': tensor([2.5000, 1.0000])}
    """

    like: Params
    symmetric: bool = True

    @abc.abstractmethod
    def matvec(self, vector: Params) -> Params:
        """``C v`` for one vector; ``C @ v`` also checks and casts the vector.

        Args:
            vector: v, shaped like the parameters.

        Returns:
            ``C v``, shaped like the parameters.
        """

    def matmat(self, vectors: Params, chunk_size: int | None = None) -> Params:
        """``C`` times each vector of a stack.

        Args:
            vectors: (K, *shape) for each parameter.
            chunk_size: the number of vectors that ``vmap`` multiplies at a time. None multiplies
                one vector after another, which on a CPU is at least as fast and needs the memory
                of one product only. ``torch.compile`` unrolls that loop, so for many vectors a
                larger chunk compiles in a fraction of the time.

        Returns:
            (K, *shape) for each parameter. Costs K products, unless the class has a cheaper
            formula.

        Raises:
            ValueError: ``chunk_size`` is neither None nor a positive int.
        """
        if chunk_size is not None:
            return in_chunks(self.matvec, vectors, chunk_size)
        return stack((self.matvec(v) for v in unstack(vectors)), count_of(vectors))

    def products(self, vectors: Params, chunk_size: int | None = None) -> Iterator[Params]:
        """``C`` times each vector of a stack, as an iterator.

        A caller that uses each product once needs no second stack in memory, provided that the
        class computes the products one at a time.

        Args:
            vectors: (K, *shape) for each parameter.
            chunk_size: see :meth:`matmat`.

        Returns:
            An iterator over the K products, each shaped like the parameters.
        """
        return unstack(self.matmat(vectors, chunk_size))

    def quadratic_forms(self, vectors: Params, chunk_size: int | None = None) -> Tensor:
        """``v · C v`` for each vector of a stack.

        Args:
            vectors: (K, *shape) for each parameter.
            chunk_size: see :meth:`matmat`.

        Returns:
            (K,) values, summed in float64 where the device supports it. Costs one product per
            vector, unless the class has a cheaper formula, as :class:`funcprecond.GGN` has.
        """
        pairs = zip(unstack(vectors), self.products(vectors, chunk_size), strict=True)
        return torch.stack([wide_dot(v, product) for v, product in pairs])

    def __matmul__(self, other: Any) -> Any:
        """``C @ v`` for a vector, ``C @ V`` for a stack, or the product of two operators.

        Args:
            other: a vector, a stack of vectors, or an operator on vectors of the same shapes. A
                vector is cast to the parameters' dtypes, and the result is cast back.

        Returns:
            A vector or a stack like ``other``, or an :class:`Operator`.

        Raises:
            ValueError: the names or shapes of ``other`` differ from those of the parameters.

        Example:
            >>> import torch, funcprecond as fp
            >>> c = fp.operators.Identity({"w": torch.zeros(2)}, 3.0)
            >>> (c @ {"w": torch.ones(5, 2)})["w"].shape
            torch.Size([5, 2])
        """
        if isinstance(other, Operator):
            return algebra.Product(self, other)
        stacked = is_stack(other, self.like)
        vector = treemath.cast(other, self.like)
        product = self.matmat(vector) if stacked else self.matvec(vector)
        return treemath.cast(product, other)

    # ------------------------------------------------------------------------------------- algebra
    def __add__(self, other: Any) -> "Operator":
        """The sum; a number or a 0-d tensor stands for that multiple of the identity."""
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
        """The diagonal block that belongs to some of the parameters.

        Args:
            names: the names of these parameters.

        Returns:
            An operator on vectors that contain only these parameters. One of its products costs at
            most one product of the whole operator.

        Raises:
            ValueError: ``names`` is empty or contains an unknown name.
        """
        unknown = [k for k in names if k not in self.like]
        if unknown or not names:
            msg = (
                "a block needs the names of one or more of the operator's parameters, "
                f"not {listed(names)} (unknown: {listed(unknown)})"
            )
            raise ValueError(msg)
        return self._block(names)

    def blocks(self, by: Partition = "layer") -> "algebra.BlockDiagonal":
        """The block-diagonal part.

        Args:
            by: "layer" for one block per module, "tensor" for one block per parameter, or a mapping
                from a label to parameter names that contains every parameter exactly once.

        Returns:
            A block-diagonal operator, whose ``parts`` maps each label to its block.

        Raises:
            ValueError: ``by`` is none of these, or its mapping omits, repeats or adds a parameter.

        Example:
            >>> import torch, funcprecond as fp
            >>> like = {"0.weight": torch.zeros(2), "0.bias": torch.zeros(1)}
            >>> fp.operators.Matrix(torch.ones(3, 3), like).blocks("tensor").to_dense()
            tensor([[1., 1., 0.],
                    [1., 1., 0.],
                    [0., 0., 1.]])
        """
        groups = partition_of(self.like, by)
        return algebra.BlockDiagonal({label: self.block(names) for label, names in groups.items()})

    # ------------------------------------------------------------------------------------ the whole
    @property
    def size(self) -> int:
        """P, the number of rows of C: the total number of entries of the parameters."""
        return sum(p.numel() for p in self.like.values())

    @property
    def flat_options(self) -> dict[str, Any]:
        """The ``dtype`` (float32 or wider) and ``device`` of a flat vector of all parameters."""
        device = next(iter(self.like.values())).device
        dtypes = (p.dtype for p in self.like.values())
        return {
            "dtype": functools.reduce(torch.promote_types, dtypes, torch.float32),
            "device": device,
        }

    def diagonal(self) -> Params:
        """The exact diagonal.

        Returns:
            The diagonal, shaped like the parameters. Costs P quadratic forms, unless the class has
            a cheaper formula.
        """
        parts = [self.quadratic_forms(basis) for basis in self._basis()]
        diagonal = treemath.unravel(torch.cat(parts), self.like)
        return treemath.cast(diagonal, self.like)

    def trace(self) -> Tensor:
        """The exact trace.

        Returns:
            A 0-d tensor. Costs as much as :meth:`diagonal`; :func:`funcprecond.xtrace` estimates
            the trace with far fewer products.
        """
        return treemath.ravel(self.diagonal()).sum()

    def frobenius_norm(self) -> Tensor:
        """The exact Frobenius norm, the square root of the sum of all squared entries.

        Returns:
            A 0-d tensor. Costs P products, unless the class has a cheaper formula.
        """
        return torch.stack([c.square().sum() for c in self._columns()]).sum().sqrt()

    def to_dense(self) -> Tensor:
        """The dense matrix.

        Returns:
            (P, P), with the entries of the parameters in the order of ``like``. Costs P products,
            unless the class has a cheaper formula.

        Example:
            >>> import torch, funcprecond as fp
            >>> fp.operators.Identity({"w": torch.zeros(2)}, 3.0).to_dense()
            tensor([[3., 0.],
                    [0., 3.]])
        """
        return torch.cat(list(self._columns())).mT

    def to_scipy(self) -> Any:
        """The operator for SciPy's solvers.

        Returns:
            A ``scipy.sparse.linalg.LinearOperator`` of shape (P, P) on flat NumPy vectors. Each
            product moves its vector to the parameters' device and the result back to the CPU.

        Raises:
            ModuleNotFoundError: SciPy is not installed.
        """
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
            b: the right-hand side, shaped like the parameters.
            damping: the multiple of the identity that is added to C.
            method: "direct" applies ``C.inverse(damping)``, and once more to the residual if this
                is larger than ``tol``; it is the default if C has an ``inverse``. "cg", the default
                otherwise, needs a positive definite ``C + damping I``; "minres" accepts any
                symmetric C; "truncated_cg" minimizes the quadratic model within a trust region;
                "neumann" sums a Neumann series.
            precondition: an operator or a function ``r -> M^-1 r``, such as the inverse of a
                :class:`funcprecond.KroneckerFactored`. "direct" ignores it, and "truncated_cg" does
                not accept it.
            throw: whether to raise an error if the residual does not reach the tolerance. Under a
                ``torch.func`` transform or ``torch.compile`` nothing is raised; check the
                ``reason`` of the solution instead.
            **options: the further arguments of :func:`funcprecond.linalg.cg`,
                :func:`~funcprecond.linalg.minres`, :func:`~funcprecond.linalg.truncated_cg` or
                :func:`~funcprecond.linalg.neumann`, such as ``tol`` and ``max_iter``.

        Returns:
            A :class:`funcprecond.Solution`: the solution, the residual, the number of iterations
            and the reason for stopping, which is RESIDUAL only if the true residual is at most
            ``tol`` (1e-5 by default) times ``b``. An iterative method costs one product per
            iteration and one or two more, "direct" costs one or two.

        Raises:
            NotConverged: the residual did not reach the tolerance and ``throw`` is true; the
                exception's ``result`` is the :class:`funcprecond.Solution`. "truncated_cg" may also
                stop at the boundary of the trust region without an error.
            TypeError: C is not symmetric.
            ValueError: ``method`` is unknown, or it is "direct" and C has no ``inverse``.

        Example:
            >>> import torch, funcprecond as fp
            >>> like = {"w": torch.zeros(2)}
            >>> c = fp.operators.Matrix(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), like)
            >>> c.solve({"w": torch.tensor([4.0, 4.0])}, damping=1.0).solution
            {'w': tensor([1., 1.])}
        """
        options |= {"damping": damping, "method": method, "precondition": precondition}
        return solve(self, b, throw=throw, **options)

    # ----------------------------------------------------------------------------------- internals
    def _block(self, names: Sequence[str]) -> "Operator":
        """The block of ``names``, which :meth:`block` has checked."""
        return algebra.Block(self, names)

    def _columns(self) -> Iterator[Tensor]:
        """The columns of C as the rows of (K, P) matrices, with at most ``COLUMNS`` in each."""
        for basis in self._basis():
            yield to_rows(self.matmat(basis), self.like)

    def _basis(self) -> Iterator[Params]:
        """The unit vectors in order, in stacks of at most ``COLUMNS``."""
        size = self.size
        for start in range(0, size, COLUMNS):
            count = min(COLUMNS, size - start)
            rows = torch.zeros(count, size, **self.flat_options)
            rows.diagonal(start).fill_(1)
            yield from_rows(rows, self.like)


# Sums, products and blocks are operators too, so the module that defines them imports this one.
from funcprecond.operators import algebra  # noqa: E402
