r"""CASPR's combination of axis preconditioners: a power of a Kronecker *sum* of inverse roots.

With k axes, :math:`X_p = (\frac1k \sum_i S_i^{-1/2p})^p`, where each root acts along its own axis.
The roots commute, so that this is the mean of order 1/p of the one-sided preconditioners
:math:`S_i^{-1/2}`: p = 1 is their plain average, p = 2 is CASPR for matrices, and
:math:`p \to \infty` is the geometric mean, Shampoo. With p = k the roots are exactly Shampoo's. The
total degree is always that of one inverse square root.

In the eigenbases :math:`Q_i` of the factors all roots are diagonal: with
:math:`S_i = Q_i \Lambda_i Q_i^T`, rotate, multiply each entry by
:math:`(\frac1k \sum_i \lambda_i^{-1/2p})^p`, and rotate back. This takes 2 k products for any p,
whereas p passes of roots take p k. If the roots come from eigendecompositions anyway, the
eigenvectors are therefore kept instead of the roots.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg.axes import along, mode_product, multiply
from funcprecond.linalg.blocking import Blocking
from funcprecond.linalg.inverse_roots import Method, eigen_root
from funcprecond.need import Need, Turn
from funcprecond.representation.kronecker_dim import KroneckerDim
from funcprecond.solver.inverse_root import (
    InverseRoot,
    Roots,
    apply_blocks,
    diagonal_roots,
    refreshed,
)
from funcprecond.tree import Params, state, static

__all__ = ["KroneckerSum", "Spectra"]


@state
class Spectra:
    """Inverse roots as eigenvectors and roots of eigenvalues, ready to be applied.

    Attributes:
        bases: for each block a tuple of (n_i, n_i) matrices, one for each axis with a factor, with
            the eigenvectors as columns.
        values: for each block a tuple of (n_i,) vectors, the inverse roots of the eigenvalues.
        diagonals, kept, blocking: see :class:`funcprecond.solver.inverse_root.Roots`.
    """

    bases: dict[str, tuple[Tensor, ...]]
    values: dict[str, tuple[Tensor, ...]]
    diagonals: Params
    kept: Tensor
    blocking: Blocking = static(default=Blocking())


@dataclasses.dataclass(frozen=True)
class KroneckerSum:
    """The power mean of the one-sided preconditioners of the axes.

    Attributes:
        epsilon: the ridge, relative to the largest eigenvalue of each factor. A direction with
            curvature along one axis and none along another is amplified by about
            ``epsilon^(-1/2) / 4``, and by ``epsilon^(-1/4)`` in Shampoo; use 1e-6 or more in
            float32.
        p: the order; None means the number of axes, and ``math.inf`` is the geometric mean,
            Shampoo. In eigenbases it can be any positive number, in passes it must be a whole one.
        dtype: see :func:`funcprecond.linalg.inverse_root`.
        method: see :func:`funcprecond.linalg.inverse_root`. With "eigh", which "auto" is on a CPU,
            eigenvectors are kept; otherwise roots are, which are applied in p passes.
    """

    epsilon: float | Tensor = 1e-6
    p: float | None = None
    dtype: torch.dtype | None = None
    method: Method = "auto"
    accepts: ClassVar[tuple[type, ...]] = (KroneckerDim,)
    needs: ClassVar[tuple[Need, ...]] = ()
    staggers: ClassVar[bool] = True

    def init(self, representation: KroneckerDim) -> Roots | Spectra:
        """Identity matrices, which stay where no root can be computed.

        Args:
            representation: the representation before the first measurement.

        Returns:
            The factor.

        Raises:
            ValueError: ``p`` is not a whole number, and the roots are applied in passes.
        """
        roots = self._root.init(representation)
        on_cpu = representation.normalizer.device.type == "cpu"
        if not (self.method == "eigh" or (self.method == "auto" and on_cpu)):
            if self.p not in (None, math.inf) and self.p % 1:
                msg = (
                    f"p={self.p} must be a whole number if the roots are applied in p passes: use "
                    "method='eigh' for other p"
                )
                raise ValueError(msg)
            return roots
        values = {
            k: tuple(torch.ones_like(x[0]) for x in factors) for k, factors in roots.roots.items()
        }
        return Spectra(roots.roots, values, roots.diagonals, roots.kept, roots.blocking)

    def prepare(
        self, representation: KroneckerDim, previous: Roots | Spectra, turn: Turn | None = None
    ) -> Roots | Spectra:
        """Decompose all factors, or those that are due.

        Args:
            representation: the curvature.
            previous: the old factor.
            turn: selects the factors that are due; None means all.

        Returns:
            The factor. Costs one eigendecomposition or one iteration per factor.
        """
        if isinstance(previous, Roots):
            return self._root.prepare(representation, previous, turn)

        def take(stack: Tensor, vectors: Tensor, values: Tensor, k: int) -> tuple[Tensor, ...]:
            order = k if self.p in (None, math.inf) else self.p
            q, root, ok = eigen_root(
                stack / representation.normalizer, 2 * order, epsilon=self.epsilon, dtype=self.dtype
            )
            kept = ok.unsqueeze(-1)
            q = torch.where(kept.unsqueeze(-1), q, vectors).contiguous()
            return q, torch.where(kept, root, values), ok

        (bases, values), failed = refreshed(
            take, representation.totals, (previous.bases, previous.values), turn
        )
        diagonals = diagonal_roots(
            representation, representation.diagonals, previous.diagonals, self.epsilon
        )
        kept = previous.kept + failed
        return Spectra(bases, values, diagonals, kept, representation.blocking)

    def apply(
        self, factor: Roots | Spectra, grads: Params, evidence: Evidence | None = None
    ) -> Params:
        """Multiply the gradient by the power mean.

        Args:
            factor: the result of :meth:`prepare`.
            grads: the gradient.
            evidence: not used.

        Returns:
            The direction. A block with k axes costs 2 k products in eigenbases, where Shampoo takes
            k, and p k products in passes.
        """
        layout = factor.blocking

        def by_passes(roots: tuple[Tensor, ...], x: Tensor) -> Tensor:
            axes = layout.axes(x.shape)
            if self.p == math.inf:
                return multiply(roots, x, axes)
            for _ in range(int(self.p or len(roots))):
                x = _mean_over_axes(roots, axes, x)
            return x

        def in_bases(bases: tuple[Tensor, ...], values: tuple[Tensor, ...], x: Tensor) -> Tensor:
            axes = layout.axes(x.shape)
            y = multiply([q.mT for q in bases], x, axes)
            shaped = [along((v,), (axis,), x) for axis, v in zip(axes, values, strict=True)]
            if self.p == math.inf:
                y = functools.reduce(torch.mul, shaped, y)
            else:
                mean = functools.reduce(torch.add, [v / len(shaped) for v in shaped])
                y = y * mean ** (self.p or len(shaped))
            return multiply(bases, y, axes)

        if isinstance(factor, Roots):
            return factor.apply(grads, by_passes)
        factors = (factor.bases, factor.values)
        return apply_blocks(in_bases, factors, factor.diagonals, layout, grads)

    @property
    def _root(self) -> InverseRoot:
        exponent = None if self.p in (None, math.inf) else 0.5 / self.p
        return InverseRoot(self.epsilon, exponent, self.dtype, self.method)


def _mean_over_axes(roots: tuple[Tensor, ...], axes: tuple[int, ...], x: Tensor) -> Tensor:
    if axes == (0, 1) and x.ndim == 2:
        left, right = roots
        return torch.addmm(x @ right.mT, left, x, beta=0.5, alpha=0.5)
    total = sum(mode_product(r, x, axis) for axis, r in zip(axes, roots, strict=True))
    return total / len(roots)  # pyright: ignore[reportReturnType]
