"""The damped inverse of curvature of rank one, by the Sherman-Morrison formula."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.need import Need
from funcprecond.representation.layer_averages import parameters
from funcprecond.representation.mean_rows import MeanRows
from funcprecond.solver.layer_gradient import BlockShape, LayerGradient, apply_blocks
from funcprecond.tree import Params, state

__all__ = ["RankOne", "Vectors"]


@state
class Vectors:
    """The averaged vectors of each layer's matrix.

    Attributes:
        left: the vectors u of the rows by block, (o,), or (J, o / J) for J groups.
        right: the vectors v of the columns, (i,), or (J, i / J). A block may lack one of them.
    """

    left: dict[str, Tensor]
    right: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class RankOne:
    """``(λ I + u u^T ⊗ v v^T)^-1 G``, with the identity in place of a vector that a block lacks.

    Parameters outside of layers have the curvature 0, so that their gradient is divided by λ.

    Attributes:
        damping: λ. It is used at every step, so that a schedule needs no refresh.
    """

    damping: float | Tensor = 0.03
    accepts: ClassVar[tuple[type, ...]] = (MeanRows,)
    needs: ClassVar[tuple[Need, ...]] = ()
    staggers: ClassVar[bool] = False

    def init(self, representation: MeanRows) -> Vectors:
        """Empty dicts, like those of the representation.

        Args:
            representation: the representation before the first measurement.

        Returns:
            The factor.
        """
        return Vectors({}, {})

    def prepare(self, representation: MeanRows, previous: Vectors) -> Vectors:
        """Divide the totals by their normalizers.

        Args:
            representation: the curvature.
            previous: not used.

        Returns:
            The factor.
        """
        return Vectors(*representation.averages())

    def apply(self, factor: Vectors, grads: Params, evidence: Evidence | None = None) -> Params:
        """Remove a part of the gradient along the vectors, and divide by the damping.

        Args:
            factor: the result of :meth:`prepare`.
            grads: the gradient.
            evidence: not used.

        Returns:
            The direction. Costs one product of the gradient with a vector, and one outer product.
        """

        def solve(block: str, gradient: LayerGradient) -> LayerGradient:
            g, u, v = gradient.matrix(), factor.left.get(block), factor.right.get(block)
            along, square = g, 1.0
            if v is not None:
                along = along @ v.unsqueeze(-1)
                square = square * _square(v)
            if u is not None:
                along = u.unsqueeze(-2) @ along
                square = square * _square(u)
            along = along / (self.damping + square)
            along = along if u is None else u.unsqueeze(-1) * along
            along = along if v is None else along * v.unsqueeze(-2)
            return LayerGradient(None, (g - along) / self.damping)

        shapes = {}
        for k, x in {**factor.left, **factor.right}.items():
            sides = factor.left.get(k), factor.right.get(k)
            shapes[k] = BlockShape.of_side(grads, k, *sides, x.shape[0] if x.ndim == 2 else 1)
        covered = {name for block in shapes for name in parameters(block)}
        others = {k: 0.0 for k in grads if k not in covered}
        return apply_blocks(grads, shapes, solve, {}, others, self.damping)


def _square(x: Tensor) -> Tensor:
    """The squared length of a vector, or of each vector of a stack, (J, 1, 1)."""
    return x.square().sum(-1)[..., None, None] if x.ndim == 2 else x.square().sum()
