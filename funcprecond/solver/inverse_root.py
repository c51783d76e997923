"""Axis preconditioners by inverse roots: Shampoo's product of one root for each axis.

A factor that is zero or not finite, or whose root does not converge, keeps its previous root.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.observe import Turn
from funcprecond.problem import Params
from funcprecond.representation.blocks import Blocking
from funcprecond.representation.dense import Dense
from funcprecond.representation.diagonal import factor_dtype
from funcprecond.representation.kronecker_dim import KroneckerDim
from funcprecond.representation.stacks import by_shape, over_stacks
from funcprecond.solver.root import Method, inverse_root
from funcprecond.tree import state, static

__all__ = ["InverseRoot", "Roots", "mode_product"]


# A dense matrix acts on the whole parameter as one axis.
WHOLE = Blocking(merge=2**62)


@state
class Roots:
    """Inverse roots, ready to be applied.

    Attributes:
        roots: for each block a tuple of (n_i, n_i) matrices, one an axis with a factor.
        diagonals: for the other parameters the inverse root, entry by entry.
        kept: how many roots could not be taken so far and stayed as they were, 0-d.
        blocking: how parameters are cut into blocks.
    """

    roots: dict[str, tuple[Tensor, ...]]
    diagonals: dict[str, Tensor]
    kept: Tensor
    blocking: Blocking = static(default=Blocking())

    def apply(self, grads: Params, solve: Callable[[tuple[Tensor, ...], Tensor], Tensor]) -> Params:
        """``solve(roots, block)`` for each block, and a product with the rest's diagonal."""
        blocks: dict[str, Tensor] = {}
        for name, g in grads.items():
            if name not in self.diagonals:
                blocks |= self.blocking.split(name, g.to(factor_dtype(g)))
        solved: dict[str, Tensor] = {}
        for k in sorted({len(self.roots[block]) for block in blocks}):
            names = [block for block in blocks if len(self.roots[block]) == k]
            found = over_stacks(
                lambda x, *roots: solve(roots[:-1], x),
                [blocks[block] for block in names],
                *([self.roots[block][i] for block in names] for i in range(k)),
                static=[None] * len(names),
            )
            solved |= dict(zip(names, found, strict=True))
        return {
            name: (
                g * self.diagonals[name]
                if name in self.diagonals
                else self.blocking.join(name, solved, g)
            ).to(g.dtype)
            for name, g in grads.items()
        }


@dataclasses.dataclass(frozen=True)
class InverseRoot:
    """Apply ``S_i^(-exponent)`` along every axis; for a dense matrix, ``C^(-exponent)``.

    Attributes:
        epsilon: the ridge, relative to each factor's largest eigenvalue.
        exponent: of each factor; by default 1/2 shared by the k axes, ``1 / (2 k)``.
        dtype, method: see :func:`funcprecond.solver.root.inverse_root`.
    """

    epsilon: float | Tensor = 1e-6
    exponent: float | None = None
    dtype: torch.dtype | None = None
    method: Method = "auto"
    accepts: ClassVar[tuple[type, ...]] = (KroneckerDim, Dense)

    def init(self, representation: KroneckerDim | Dense) -> Roots:
        """Identity: what stays where no root can be taken yet."""
        factors, diagonals, blocking = _factors(representation)
        eye = {
            k: tuple(torch.eye(s.shape[-1], dtype=s.dtype, device=s.device) for s in f)
            for k, f in factors.items()
        }
        kept = torch.zeros_like(representation.weight, dtype=torch.int64)
        return Roots(eye, {k: torch.ones_like(d) for k, d in diagonals.items()}, kept, blocking)

    def prepare(
        self, representation: KroneckerDim | Dense, previous: Roots, turn: Turn | None = None
    ) -> Roots:
        """Take the roots, all of them or those whose turn it is."""
        factors, diagonals, blocking = _factors(representation)
        flat = [s for f in factors.values() for s in f]
        roots = [r for f in previous.roots.values() for r in f]
        powers = [1 / (self.exponent or 0.5 / len(f)) for f in factors.values() for _ in f]
        due = range(len(flat)) if turn is None else turn.share([s.shape[-1] ** 3 for s in flat])
        failures = []

        def take(stack: Tensor, before: Tensor, p: float) -> Tensor:
            root, ok = inverse_root(
                stack / representation.weight,
                p,
                epsilon=self.epsilon,
                method=self.method,
                dtype=self.dtype,
            )
            failures.append((~ok).sum())
            return torch.where(ok[..., None, None], root, before)

        new = by_shape(
            take, [flat[i] for i in due], [roots[i] for i in due], static=[powers[i] for i in due]
        )
        for i, root in zip(due, new, strict=True):
            roots[i] = root
        rest = iter(roots)
        return Roots(
            {k: tuple(next(rest) for _ in f) for k, f in factors.items()},
            self._diagonals(representation, diagonals, previous),
            functools.reduce(torch.add, failures, previous.kept),
            blocking,
        )

    def apply(self, factor: Roots, grads: Params) -> Params:
        """One product an axis."""

        def solve(roots: tuple[Tensor, ...], x: Tensor) -> Tensor:
            for axis, root in zip(factor.blocking.axes(x.shape), roots, strict=True):
                x = mode_product(root, x, axis)
            return x

        return factor.apply(grads, solve)

    def _diagonals(self, representation, diagonals, previous: Roots) -> dict[str, Tensor]:
        new = {}
        for name, d in diagonals.items():
            d = d / representation.weight
            largest = d.max() if d.numel() else d.new_zeros(())
            ok = torch.isfinite(largest) & (largest > 0)
            ridge = self.epsilon * torch.where(ok, largest, 1.0)
            new[name] = torch.where(ok, (d + ridge).rsqrt(), previous.diagonals[name])
        return new


def mode_product(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """Contract ``axis`` of ``x`` with axis 1 of ``matrix``; the axis stays in place."""
    if x.ndim == 2:
        return matrix @ x if axis == 0 else x @ matrix.mT
    product = torch.tensordot(matrix, x, ([1], [axis]))  # pyright: ignore[reportArgumentType]
    return product.movedim(0, axis)


def _factors(representation: KroneckerDim | Dense):
    if isinstance(representation, Dense):
        return {k: (t,) for k, t in representation.total.items()}, {}, WHOLE
    return representation.totals, representation.diagonals, representation.blocking
