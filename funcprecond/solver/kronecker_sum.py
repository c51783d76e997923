r"""CASPR's combination of axis preconditioners: a power of a Kronecker *sum* of inverse roots.

With k axes, :math:`X_p = (\frac1k \sum_i S_i^{-1/2p})^p`, each root acting along its own axis. The
roots commute, so this is their power mean of order 1/p: p = 1 is the plain average of the one-sided
preconditioners, p = 2 is CASPR for matrices, and :math:`p \to \infty` is the geometric mean,
Shampoo. With p = k the roots are exactly Shampoo's, and the total degree is always that of one
inverse square root.

In the eigenbases :math:`Q_i` of the factors all roots are diagonal: with :math:`S_i = Q_i
\Lambda_i Q_i^T`, rotate, multiply each entry by :math:`(\frac1k \sum_i \lambda_i^{-1/2p})^p`, and
rotate back. That takes 2 k products for any p, p passes of roots take p k; so where roots come from
eigendecompositions anyway, it is the eigenvectors that are kept.
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
    """Inverse roots in two parts, ready to be applied.

    Attributes:
        bases, values: for each block a tuple of (n_i, n_i) eigenvectors, as columns, and one of
            (n_i,) eigenvalues' roots, one an axis with a factor.
        diagonals, kept, blocking: see :class:`funcprecond.solver.inverse_root.Roots`.
    """

    bases: dict[str, tuple[Tensor, ...]]
    values: dict[str, tuple[Tensor, ...]]
    diagonals: Params
    kept: Tensor
    blocking: Blocking = static(default=Blocking())


@dataclasses.dataclass(frozen=True)
class KroneckerSum:
    """The power mean of the axes' preconditioners.

    Attributes:
        epsilon: the ridge, relative to each factor's largest eigenvalue. A direction that one axis
            has seen and another has not is amplified by about ``epsilon^(-1/2) / 4``, Shampoo's by
            ``epsilon^(-1/4)``: keep it at 1e-6 or above in float32.
        p: the order, by default the number of axes; ``math.inf`` is the geometric mean, Shampoo. In
            eigenbases any positive number, in passes a whole one.
        dtype, method: see :func:`funcprecond.linalg.inverse_roots.inverse_root`. With "eigh", which "auto"
            is on a CPU, eigenvectors are kept; otherwise roots, applied in p passes.
    """

    epsilon: float | Tensor = 1e-6
    p: float | None = None
    dtype: torch.dtype | None = None
    method: Method = "auto"
    accepts: ClassVar[tuple[type, ...]] = (KroneckerDim,)
    needs: ClassVar[tuple[Need, ...]] = ()
    staggers: ClassVar[bool] = True

    def init(self, representation: KroneckerDim) -> Roots | Spectra:
        """Identity; raises ValueError if ``p`` is not whole and roots are applied in passes."""
        roots = self._root.init(representation)
        on_cpu = representation.normalizer.device.type == "cpu"
        if not (self.method == "eigh" or (self.method == "auto" and on_cpu)):
            if self.p not in (None, math.inf) and self.p % 1:
                msg = f"{self.p} passes cannot be made: use method='eigh' for such a p"
                raise ValueError(msg)
            return roots
        values = {
            k: tuple(torch.ones_like(x[0]) for x in factors) for k, factors in roots.roots.items()
        }
        return Spectra(roots.roots, values, roots.diagonals, roots.kept, roots.blocking)

    def prepare(
        self, representation: KroneckerDim, previous: Roots | Spectra, turn: Turn | None = None
    ) -> Roots | Spectra:
        """Decompose the factors, all of them or those whose turn it is."""
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
        """``2 k`` products a block of k axes in eigenbases, where Shampoo takes k; p k by roots."""
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
