"""Axis preconditioners by inverse roots: Shampoo's product with one root per axis.

A factor keeps its previous root if it is zero, below the normal numbers of its dtype (as squares of
vanishing gradients are) or not finite, or if its root does not converge.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg.axes import multiply
from funcprecond.linalg.batching import by_shape, over_stacks
from funcprecond.linalg.blocking import Blocking
from funcprecond.linalg.inverse_roots import Method, Ridge, inverse_root
from funcprecond.linalg.precision import factor_dtype
from funcprecond.need import Need, Turn
from funcprecond.representation.dense import Dense
from funcprecond.representation.kronecker_dim import KroneckerDim
from funcprecond.tree import Params, state, static

__all__ = ["InverseRoot", "Roots", "diagonal_roots", "refreshed"]


# A dense matrix acts on the whole parameter as on a single axis.
WHOLE = Blocking(merge=2**62)


@state
class Roots:
    """Inverse roots, ready to be applied.

    Attributes:
        roots: for each block a tuple of (n_i, n_i) matrices, one for each axis with a factor.
        diagonals: for each parameter without factors the inverse root, entry by entry.
        kept: how often a root could not be computed so far and the previous one was kept, 0-d.
        blocking: how parameters are cut into blocks.
    """

    roots: dict[str, tuple[Tensor, ...]]
    diagonals: dict[str, Tensor]
    kept: Tensor
    blocking: Blocking = static(default=Blocking())

    def apply(self, grads: Params, solve: Callable[..., Tensor]) -> Params:
        """Apply the roots to each block, and multiply the other parameters by their inverse roots.

        Args:
            grads: the gradient.
            solve: ``(roots, block) -> direction``, for one block.

        Returns:
            The direction, with the names and dtypes of ``grads``.
        """
        return apply_blocks(solve, (self.roots,), self.diagonals, self.blocking, grads)


@dataclasses.dataclass(frozen=True)
class InverseRoot:
    """Apply ``S_i^(-exponent)`` along every axis, or ``C^(-exponent)`` for a dense matrix.

    Attributes:
        epsilon: the ridge, relative to the largest eigenvalue of each factor.
        exponent: the exponent of each factor; None means ``1 / (2 k)``, an equal share of 1/2 for
            each of the k axes.
        dtype, method, ridge: see :func:`funcprecond.linalg.inverse_root`.
    """

    epsilon: float | Tensor = 1e-6
    exponent: float | None = None
    dtype: torch.dtype | None = None
    method: Method = "auto"
    ridge: Ridge = "inner"
    accepts: ClassVar[tuple[type, ...]] = (KroneckerDim, Dense)
    needs: ClassVar[tuple[Need, ...]] = ()
    staggers: ClassVar[bool] = True

    def init(self, representation: KroneckerDim | Dense) -> Roots:
        """Identity matrices, which stay where no root can be computed.

        Args:
            representation: the representation before the first measurement.

        Returns:
            The factor.
        """
        factors, diagonals, blocking = _factors(representation)
        eye = {
            k: tuple(torch.eye(s.shape[-1], dtype=s.dtype, device=s.device) for s in f)
            for k, f in factors.items()
        }
        kept = torch.zeros_like(representation.normalizer, dtype=torch.int64)
        return Roots(eye, {k: torch.ones_like(d) for k, d in diagonals.items()}, kept, blocking)

    def prepare(
        self, representation: KroneckerDim | Dense, previous: Roots, turn: Turn | None = None
    ) -> Roots:
        """Compute the roots of all factors, or of those that are due.

        Args:
            representation: the curvature.
            previous: the old roots.
            turn: selects the factors that are due; None means all.

        Returns:
            The roots. Costs one eigendecomposition or one iteration per factor, see
            :func:`funcprecond.linalg.inverse_root`.
        """
        factors, diagonals, blocking = _factors(representation)

        def take(stack: Tensor, before: Tensor, k: int) -> tuple[Tensor, Tensor]:
            p = 1 / (self.exponent or 0.5 / k)
            root, ok = inverse_root(
                stack / representation.normalizer,
                p,
                epsilon=self.epsilon,
                method=self.method,
                dtype=self.dtype,
                ridge=self.ridge,
            )
            return torch.where(ok[..., None, None], root, before), ok

        (roots,), failed = refreshed(take, factors, (previous.roots,), turn)
        inverses = diagonal_roots(representation, diagonals, previous.diagonals, self.epsilon)
        return Roots(roots, inverses, previous.kept + failed, blocking)

    def apply(self, factor: Roots, grads: Params, evidence: Evidence | None = None) -> Params:
        """Multiply the gradient by the roots.

        Args:
            factor: the roots.
            grads: the gradient.
            evidence: not used.

        Returns:
            The direction. Costs one product per axis.
        """

        def solve(roots: tuple[Tensor, ...], x: Tensor) -> Tensor:
            return multiply(roots, x, factor.blocking.axes(x.shape))

        return factor.apply(grads, solve)


def apply_blocks(
    solve: Callable[..., Tensor],
    factors: Sequence[dict[str, tuple[Tensor, ...]]],
    diagonals: Params,
    blocking: Blocking,
    grads: Params,
) -> Params:
    """Solve for each block, and multiply the other parameters by their diagonal.

    Args:
        solve: ``(*tuples, block) -> direction``, with one tuple of factors from each of
            ``factors``.
        factors: dicts with a tuple of factors for each block, one per axis.
        diagonals: for each parameter without factors, the number for each of its entries.
        blocking: how parameters are cut into blocks.
        grads: the gradient.

    Returns:
        The direction, with the names and dtypes of ``grads``.
    """
    blocks: dict[str, Tensor] = {}
    for name, g in grads.items():
        if name not in diagonals:
            blocks |= blocking.split(name, g.to(factor_dtype(g)))
    solved: dict[str, Tensor] = {}
    for k in sorted({len(factors[0][block]) for block in blocks}):
        names = [block for block in blocks if len(factors[0][block]) == k]

        def either(x: Tensor, *flat: Any, k: int = k) -> Tensor:
            return solve(*(flat[i : i + k] for i in range(0, len(flat) - 1, k)), x)

        found = over_stacks(
            either,
            [blocks[block] for block in names],
            *([f[block][i] for block in names] for f in factors for i in range(k)),
            static=[None] * len(names),
        )
        solved |= dict(zip(names, found, strict=True))
    return {
        name: (g * diagonals[name] if name in diagonals else blocking.join(name, solved, g)).to(
            g.dtype
        )
        for name, g in grads.items()
    }


def refreshed(
    take: Callable[..., tuple[Tensor, ...]],
    factors: dict[str, tuple[Tensor, ...]],
    previous: Sequence[dict[str, tuple[Tensor, ...]]],
    turn: Turn | None,
) -> tuple[list[dict[str, tuple[Tensor, ...]]], Tensor | int]:
    """New values for all factors, or for those that are due.

    Args:
        take: ``(stack, *before, k) -> (*new, ok)`` for a stack of factors of blocks with k axes,
            where ``before`` are their old values.
        factors: for each block a tuple with one factor per axis.
        previous: the old values, likewise.
        turn: selects the factors that are due; None means all.

    Returns:
        The new ``previous``, and the number of factors for which ``ok`` is False.
    """
    flat = [s for f in factors.values() for s in f]
    axes = [len(f) for f in factors.values() for _ in f]
    lists = [[x for f in tree.values() for x in f] for tree in previous]
    due = range(len(flat)) if turn is None else turn.share([s.shape[-1] ** 3 for s in flat])
    found = by_shape(
        take,
        [flat[i] for i in due],
        *([x[i] for i in due] for x in lists),
        static=[axes[i] for i in due],
    )
    failed = sum((~ok).sum() for *_, ok in found)
    for i, (*new, _) in zip(due, found, strict=True):
        for x, value in zip(lists, new, strict=True):
            x[i] = value
    rest = [iter(x) for x in lists]
    return [{k: tuple(next(x) for _ in f) for k, f in factors.items()} for x in rest], failed


def diagonal_roots(
    representation: KroneckerDim | Dense, diagonals: Params, previous: Params, epsilon
) -> Params:
    """The inverse roots of the parameters without factors, entry by entry.

    A parameter whose second moment is zero, below the normal numbers or not finite keeps its
    previous root.
    """
    new = {}
    for name, d in diagonals.items():
        d = d / representation.normalizer
        largest = d.max() if d.numel() else d.new_zeros(())
        ok = torch.isfinite(largest) & (largest >= torch.finfo(d.dtype).tiny)
        largest = torch.where(ok, largest, 1.0)
        # Relative to the largest entry, the ridge does not underflow.
        root = (d / largest + epsilon).rsqrt() * largest.rsqrt()
        new[name] = torch.where(ok, root, previous[name])
    return new


def _factors(representation: KroneckerDim | Dense):
    if isinstance(representation, Dense):
        return {k: (t,) for k, t in representation.average.total.items()}, {}, WHOLE
    return representation.totals, representation.diagonals, representation.blocking
