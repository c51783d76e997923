r"""CASPR's combination of axis preconditioners: a power of a Kronecker *sum* of inverse roots.

With k axes, :math:`X_p = (\frac1k \sum_i S_i^{-1/2p})^p`, each root acting along its own axis. The
roots commute, so this is their power mean of order 1/p: p = 1 is the plain average of the one-sided
preconditioners, p = 2 is CASPR for matrices, and :math:`p \to \infty` is the geometric mean,
Shampoo. With p = k the roots are exactly Shampoo's, and the total degree is always that of one
inverse square root.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.observe import Turn
from funcprecond.problem import Params
from funcprecond.representation.kronecker_dim import KroneckerDim
from funcprecond.solver.inverse_root import InverseRoot, Roots, mode_product
from funcprecond.solver.root import Method

__all__ = ["KroneckerSum"]


@dataclasses.dataclass(frozen=True)
class KroneckerSum:
    """``p`` passes, each the average over the axes of a mode product with ``S_i^(-1/2p)``.

    Attributes:
        epsilon: the ridge, relative to each factor's largest eigenvalue. A direction that one axis
            has seen and another has not is amplified by about ``epsilon^(-1/2) / 4``, Shampoo's by
            ``epsilon^(-1/4)``: keep it at 1e-6 or above in float32.
        p: the number of passes; by default the number of axes.
        dtype, method: see :func:`funcprecond.solver.root.inverse_root`.
    """

    epsilon: float | Tensor = 1e-6
    p: int | None = None
    dtype: torch.dtype | None = None
    method: Method = "auto"
    accepts: ClassVar[tuple[type, ...]] = (KroneckerDim,)

    def init(self, representation: KroneckerDim) -> Roots:
        """Identity."""
        return self._root.init(representation)

    def prepare(
        self, representation: KroneckerDim, previous: Roots, turn: Turn | None = None
    ) -> Roots:
        """Take the roots, all of them or those whose turn it is."""
        return self._root.prepare(representation, previous, turn)

    def apply(self, factor: Roots, grads: Params) -> Params:
        """``p k`` products a block of k axes: four for a matrix, where Shampoo takes two."""

        def solve(roots: tuple[Tensor, ...], x: Tensor) -> Tensor:
            for _ in range(self.p or len(roots)):
                x = _mean_over_axes(roots, factor.blocking.axes(x.shape), x)
            return x

        return factor.apply(grads, solve)

    @property
    def _root(self) -> InverseRoot:
        exponent = None if self.p is None else 0.5 / self.p
        return InverseRoot(self.epsilon, exponent, self.dtype, self.method)


def _mean_over_axes(roots: tuple[Tensor, ...], axes: tuple[int, ...], x: Tensor) -> Tensor:
    if axes == (0, 1) and x.ndim == 2:
        left, right = roots
        return torch.addmm(x @ right.mT, left, x, beta=0.5, alpha=0.5)
    total = sum(mode_product(r, x, axis) for axis, r in zip(axes, roots, strict=True))
    return total / len(roots)  # pyright: ignore[reportReturnType]
