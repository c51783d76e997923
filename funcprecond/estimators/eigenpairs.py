r"""Extreme eigenpairs: Lanczos with thick restarts (Wu & Simon 2000).

The basis grows by one vector a product. Where it may not grow further, it is replaced by the best
half of its own Ritz vectors, with which the iteration goes on as if it had only ever known these:
memory is bounded, and little is lost. The projected matrix is taken in whole, from all inner
products with the basis, so that one loop serves the first and all later rounds.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from funcprecond.estimators.lanczos import lanczos
from funcprecond.linalg import random, treemath
from funcprecond.linalg.precision import wide, wide_dtype
from funcprecond.operators.low_rank import LowRank
from funcprecond.operators.operator import Operator
from funcprecond.operators.vector_stacks import stack
from funcprecond.tracing import is_eager

__all__ = ["eigsh"]

Which = Literal["LM", "LA", "SA"]


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
    """The k extreme eigenpairs of a symmetric operator.

    Args:
        operator: A.
        k: how many.
        which: "LM" largest in magnitude, "LA" largest, "SA" smallest, as SciPy calls them.
        tol: an error bound this small beside the largest Ritz value ends the iteration.
        max_steps: at most so many products; 10 k + 50 by default.
        max_basis: at most so many vectors in memory, at least k + 2; by default one for each
            product. Fewer of them take more products: half of the basis is given up when it is
            full.
        generator: draws the start.
        start: (P,) instead.
        throw: raise if a bound is not below ``tol``; read ``bounds`` otherwise. Nothing is raised
            where a transform watches; there the basis grows to ``max_steps``.

    Returns:
        A :class:`LowRank` of the eigenpairs, by falling magnitude for "LM" and from the end inwards
        otherwise. An eigenvalue that occurs several times has as many vectors where the space is
        exhausted on the way, as it is for a matrix of low rank; else one of them may be all that is
        found.

    Raises:
        RuntimeError: see ``throw``.
        ValueError: k is not between 1 and P, ``which`` is unknown, or ``max_basis`` is too small.
    """
    if which not in ("LM", "LA", "SA") or not 1 <= k <= operator.size:
        msg = f"k must be in 1..{operator.size} and which 'LM', 'LA' or 'SA', not {k}, {which!r}"
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
            f"{missing} of {k} eigenvalues are not known to {tol:g} after {basis.products} "
            "products: raise max_steps, max_basis or tol, or take them with throw=False"
        )
        raise RuntimeError(msg)
    return _low_rank(operator, values, vectors.mT.to(start.dtype) @ basis.rows, bounds)


class _Basis:
    """Orthonormal rows V, the projection ``V A V^T``, and the vector that A leads to from there."""

    def __init__(self, operator: Operator, start: Tensor, capacity: int):
        self.operator, self.capacity, self.count, self.products = operator, capacity, 0, 0
        self.buffer = start.new_empty(capacity, start.numel())
        self.projected = start.new_zeros((capacity, capacity), dtype=wide_dtype(start))
        self.following, self.beta = start / start.norm(), start.new_zeros(())
        self.scale = start.new_zeros((), dtype=wide_dtype(start))
        self.invariant = False

    @property
    def rows(self) -> Tensor:
        return self.buffer[: self.count]

    def grow(self, count: int) -> None:
        """Up to so many rows, or until A leads nowhere."""
        self.invariant = False
        while self.count < count and not self.invariant:
            v, j = self.following, self.count
            self.buffer[j] = v
            self.count += 1
            w = treemath.ravel(self.operator @ treemath.unravel(v, self.operator.like)).to(v.dtype)
            self.products += 1
            inner = self.rows @ w
            self.projected[: j + 1, j] = self.projected[j, : j + 1] = wide(inner)
            before = w.norm()
            w = w - inner @ self.rows
            self.beta = w.norm()
            if not bool(self.beta > 0.5 * before):
                # What rounding leaves of the old directions is no longer small beside the rest.
                w = w - (self.rows @ w) @ self.rows
                self.beta = w.norm()
            self.scale = torch.maximum(self.scale, wide(inner.norm()))
            rounding = 10 * torch.finfo(v.dtype).eps * math.sqrt(v.numel())
            self.invariant = not bool(self.beta > rounding * self.scale)
            self.following = torch.zeros_like(w) if self.invariant else w / self.beta

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """(values, vectors as columns, error bounds)."""
        values, vectors = torch.linalg.eigh(self.projected[: self.count, : self.count])
        reach = torch.zeros_like(self.beta) if self.invariant else self.beta
        return values, vectors, (reach * vectors[-1]).abs()

    def keep(self, values: Tensor, vectors: Tensor) -> None:
        """Only these Ritz pairs."""
        self.count = len(values)
        self.buffer[: self.count] = vectors.mT.to(self.buffer.dtype) @ self.buffer[: len(vectors)]
        self.projected.zero_()
        self.projected.diagonal()[: self.count] = values

    def turn(self) -> None:
        """Away from an invariant space, in a direction of its own."""
        # Any will do, and none may depend on chance that the caller has not asked for.
        g = torch.Generator().manual_seed(self.products)
        like = self.following
        w = random.normal(like.shape, g, dtype=like.dtype, device=like.device)
        for _ in range(2):
            w = w - (self.rows @ w) @ self.rows
        self.following = w / w.norm()


def _search(basis: _Basis, k: int, which: Which, tol: float, limit: int):
    """(values, Ritz vectors as columns, bounds, the largest bound allowed) of the wanted pairs."""
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
            # Another copy of an eigenvalue may lie outside: none does if nothing new comes.
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
            # At least one row must come new before the next restart.
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
