r"""Extreme eigenpairs by the Lanczos method with thick restarts (Wu & Simon 2000).

The basis grows by one vector per product. When it has reached its maximal size, it is replaced by
the wanted Ritz vectors and the better half of the others, and the iteration continues from these.
This bounds the memory and loses little. The projected matrix is computed from the inner products of
each new vector with the whole basis, not from a recursion, so that the same loop serves before and
after a restart.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from funcprecond.estimators.lanczos import finite_eigh, lanczos
from funcprecond.linalg import random, treemath
from funcprecond.linalg.precision import wide, wide_dtype
from funcprecond.operators.low_rank import LowRank
from funcprecond.operators.operator import Operator
from funcprecond.operators.solve import require_symmetric
from funcprecond.operators.vector_stacks import from_rows, stack
from funcprecond.tracing import is_eager

__all__ = ["eigsh"]

Which = Literal["LM", "LA", "SA"]
ADVICE = (
    "for a preconditioned matrix M^-1 A, use operator.to_scipy() with scipy.sparse.linalg.eigs, "
    "which accepts any matrix"
)


def eigsh(
    operator: Operator,
    k: int = 1,
    *,
    which: Which = "LM",
    tol: float = 1e-4,
    max_steps: int | None = None,
    max_basis: int | None = None,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    throw: bool = True,
) -> LowRank:
    """The k largest or smallest eigenvalues of a symmetric A, with eigenvectors.

    Lanczos with thick restarts (Wu & Simon 2000).

    Args:
        operator: A.
        k: the number of eigenpairs.
        which: "LM" for the eigenvalues of largest magnitude, "LA" for the largest, "SA" for the
            smallest, as in SciPy.
        tol: the relative accuracy: the iteration ends when the error bounds of all k eigenvalues
            are at most ``tol`` times the largest magnitude of a Ritz value.
        max_steps: the maximal number of products; 10 k + 50 by default.
        max_basis: the maximal number of basis vectors in memory, at least k + 2; ``max_steps`` by
            default. A smaller basis needs more products, since a restart discards a part of it.
        generator: draws the first vector, if ``start`` is None.
        start: the first vector, (P,).
        throw: whether to raise an error if a bound is larger than the accuracy; otherwise check
            ``bounds``. Under a ``torch.func`` transform or ``torch.compile`` nothing is raised, and
            ``max_steps`` products are taken.

    Returns:
        A :class:`funcprecond.LowRank` of the eigenpairs, in descending order of magnitude for "LM",
        in descending order for "LA" and in ascending order for "SA". Costs at most ``max_steps``
        products. A multiple eigenvalue is found with its multiplicity if the Krylov space becomes
        invariant during the iteration, as it does for a matrix of low rank; otherwise only one of
        its eigenvectors may be found. If the operator's data require gradients, the eigenvalues
        have derivatives, for k more products, and the eigenvectors have none.

    Raises:
        RuntimeError: an error bound is larger than the accuracy, and ``throw`` is true.
        TypeError: A is not symmetric.
        ValueError: k is not between 1 and P, ``which`` is unknown, ``max_basis`` is too small, or
            ``generator`` and ``start`` are both None, or a product is not finite.

    Example:
        >>> import torch, funcprecond as fp
        >>> values = {"w": torch.tensor([3.0, 2.0, 1.0])}
        >>> a = fp.operators.DiagonalMatrix(values, values)
        >>> found = fp.eigsh(a, 2, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(found.values, torch.tensor([3.0, 2.0]), atol=1e-3)
        True
    """
    require_symmetric(operator, "eigsh()", ADVICE)
    if which not in ("LM", "LA", "SA") or not 1 <= k <= operator.size:
        msg = (
            f"k must be between 1 and {operator.size}, the number of parameters, and which must be "
            f"'LM', 'LA' or 'SA', not {k} and {which!r}"
        )
        raise ValueError(msg)
    if max_basis is not None and max_basis < min(k + 2, operator.size):
        msg = f"max_basis must be at least k + 2 = {k + 2}, not {max_basis}"
        raise ValueError(msg)
    if start is None:
        start = random.normal((operator.size,), generator, **operator.flat_options)
    limit = 10 * k + 50 if max_steps is None else max_steps
    if not is_eager((start, operator.like)):
        space = lanczos(operator, start, min(limit, operator.size))
        values, vectors, bounds = space.ritz()
        chosen = _order(values, which)[:k]
        rows = vectors[:, chosen].mT.to(start.dtype) @ space.basis
        return _low_rank(operator, values[chosen], rows, bounds[chosen])
    basis = _Basis(operator, start, min(operator.size, limit, max_basis or limit))
    values, vectors, bounds, floor = _search(basis, k, which, tol, limit)
    missing = k - int((bounds <= floor).sum())
    if throw and missing:
        msg = (
            f"{missing} of {k} eigenvalues are not known to the relative accuracy {tol:g} after "
            f"{basis.products} products: raise max_steps, max_basis or tol, or pass throw=False to "
            "get the result with its error bounds"
        )
        raise RuntimeError(msg)
    rows = vectors.mT.to(start.dtype) @ basis.rows
    if basis.differentiable:
        # The derivative of a simple eigenvalue is v · dA v (Hellmann 1937, Feynman 1939), which is
        # that of the Rayleigh quotient at a fixed eigenvector v.
        values = operator.quadratic_forms(from_rows(rows, operator.like))
    return _low_rank(operator, values, rows, bounds)


class _Basis:
    """An orthonormal basis that grows by products with A.

    Attributes:
        rows: the basis vectors, as the rows of a matrix V.
        projected: ``V A V^T``, in its first ``count`` rows and columns.
        following: the next basis vector, which is the normalized component of ``A v`` orthogonal to
            the basis, where v is the last basis vector; zero if the basis spans an invariant space.
        beta: the length of that component.
    """

    def __init__(self, operator: Operator, start: Tensor, capacity: int):
        self.operator, self.capacity, self.count, self.products = operator, capacity, 0, 0
        self.buffer = start.new_empty(capacity, start.numel())
        self.projected = start.new_zeros((capacity, capacity), dtype=wide_dtype(start))
        self.following, self.beta = start / start.norm(), start.new_zeros(())
        self.scale = start.new_zeros((), dtype=wide_dtype(start))
        self.invariant, self.differentiable = False, False

    @property
    def rows(self) -> Tensor:
        return self.buffer[: self.count]

    def grow(self, count: int) -> None:
        """Extend the basis to ``count`` vectors, or until it spans an invariant space of A."""
        self.invariant = False
        while self.count < count and not self.invariant:
            v, j = self.following, self.count
            self.buffer[j] = v
            self.count += 1
            w = treemath.ravel(self.operator @ treemath.unravel(v, self.operator.like)).to(v.dtype)
            self.differentiable = self.differentiable or w.requires_grad
            w = w.detach()
            self.products += 1
            inner = self.rows @ w
            self.projected[: j + 1, j] = self.projected[j, : j + 1] = wide(inner)
            before = w.norm()
            w = w - inner @ self.rows
            self.beta = w.norm()
            if not bool(self.beta > 0.5 * before):
                # The first pass removed most of the length, so that its rounding errors in the
                # directions of the basis are not small compared with the rest.
                w = w - (self.rows @ w) @ self.rows
                self.beta = w.norm()
            self.scale = torch.maximum(self.scale, wide(inner.norm()))
            rounding = 10 * torch.finfo(v.dtype).eps * math.sqrt(v.numel())
            self.invariant = not bool(self.beta > rounding * self.scale)
            self.following = torch.zeros_like(w) if self.invariant else w / self.beta

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """The eigenvalues, the eigenvectors as columns, and the error bounds of the projection."""
        values, vectors = finite_eigh(self.projected[: self.count, : self.count])
        reach = torch.zeros_like(self.beta) if self.invariant else self.beta
        return values, vectors, (reach * vectors[-1]).abs()

    def keep(self, values: Tensor, vectors: Tensor) -> None:
        """Replace the basis by the Ritz vectors of the given eigenpairs of the projection."""
        self.count = len(values)
        self.buffer[: self.count] = vectors.mT.to(self.buffer.dtype) @ self.buffer[: len(vectors)]
        self.projected.zero_()
        self.projected.diagonal()[: self.count] = values

    def turn(self) -> None:
        """Leave an invariant space: continue from a vector that is orthogonal to the basis."""
        # Any direction serves. A seed makes it reproducible without the caller's generator.
        g = torch.Generator().manual_seed(self.products)
        like = self.following
        w = random.normal(like.shape, g, dtype=like.dtype, device=like.device)
        for _ in range(2):
            w = w - (self.rows @ w) @ self.rows
        self.following = w / w.norm()


def _search(basis: _Basis, k: int, which: Which, tol: float, limit: int):
    """Extend and restart the basis until the k wanted eigenpairs have converged.

    Returns:
        The eigenvalues, the eigenvectors of the projection as columns, the error bounds, and the
        largest bound that counts as converged.
    """
    settled: Tensor | None = None
    target = min(basis.capacity, 2 * k + 10)
    while True:
        basis.grow(min(target, basis.count + limit - basis.products))
        values, vectors, bounds = basis.ritz()
        order = _order(values, which)
        chosen = order[:k]
        floor = tol * values.abs().max()
        found = values[chosen], vectors[:, chosen], bounds[chosen], floor
        converged = len(chosen) == k and bool((found[2] <= floor).all())
        if basis.products >= limit or basis.count == basis.operator.size:
            return found
        if basis.invariant:
            # Another eigenvector of one of the eigenvalues may lie outside of the invariant space.
            # If a search there does not change the wanted eigenvalues, they are complete.
            if (
                converged
                and settled is not None
                and bool((found[0] - settled).abs().max() <= floor)
            ):
                return found
            settled = found[0] if converged else None
        elif converged:
            return found
        if basis.count == basis.capacity:
            # The restart must leave room for at least one new vector.
            kept = min(k + (basis.capacity - k) // 2, basis.capacity - 1)
            basis.keep(values[order[:kept]], vectors[:, order[:kept]])
            target = basis.capacity
        else:
            target = min(basis.capacity, basis.count + max(basis.count // 2, 2 * k + 10))
        if basis.invariant:
            basis.turn()


def _order(values: Tensor, which: Which) -> Tensor:
    if which == "SA":
        return values.argsort()
    return (values.abs() if which == "LM" else values).argsort(descending=True)


def _low_rank(operator: Operator, values: Tensor, rows: Tensor, bounds: Tensor) -> LowRank:
    vectors = stack([treemath.unravel(row, operator.like) for row in rows])
    return LowRank(values.to(rows.dtype), vectors, bounds.to(rows.dtype))
