"""The damped inverse of the curvature of each unit, whole or quasi-diagonal."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg.damped_factor import damped_factor, rounding
from funcprecond.need import Need
from funcprecond.representation.unit_blocks import UnitBlocks
from funcprecond.solver.layer_gradient import (
    BlockShape,
    LayerGradient,
    apply_blocks,
    unit_inverses,
)
from funcprecond.tree import Params, state, static

__all__ = ["UnitFactor", "UnitInverse"]


@state
class UnitFactor:
    """The prepared curvature of units, and the diagonal of the rest.

    Attributes:
        rows: for each layer whose units are the rows of its matrix, the damped inverses (U, n, n);
            with a ``border``, the averages (U, 2, n).
        columns: the same where the units are the columns.
        scales: the damped inverses of the units of norm layers.
        others: the averaged diagonal for parameters without units.
        border: see :class:`funcprecond.representation.UnitBlocks`.
    """

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    scales: dict[str, Tensor]
    others: dict[str, Tensor]
    border: bool = static(default=False)


@dataclasses.dataclass(frozen=True)
class UnitInverse:
    """``(M_o + λ I)^-1 ∇_o`` for the curvature M_o of each unit o.

    Where only the diagonal of M_o and its row of the bias b are kept, both damped (Ollivier, arXiv
    1303.0818, the quasi-diagonal reduction)::

        d_i = (∇_i - ∇_b M_bi / M_bb) / (M_ii - M_bi² / M_bb)        denominator of at least λ
        d_b = (∇_b - Σ_i M_bi d_i) / M_bb

    Attributes:
        damping: λ, in units of the loss.
    """

    damping: float | Tensor = 1e-3
    accepts: ClassVar[tuple[type, ...]] = (UnitBlocks,)
    needs: ClassVar[tuple[Need, ...]] = ()
    staggers: ClassVar[bool] = False

    def init(self, representation: UnitBlocks) -> UnitFactor:
        """Empty dicts, like those of the representation.

        Args:
            representation: the representation before the first measurement.

        Returns:
            The factor.
        """
        return UnitFactor({}, {}, {}, {}, representation.border)

    def prepare(self, representation: UnitBlocks, previous: UnitFactor) -> UnitFactor:
        """Invert the damped blocks.

        Args:
            representation: the curvature.
            previous: not used.

        Returns:
            The factor. Costs ``i³`` operations for each unit with i inputs.
        """
        rows, columns, scales, others = representation.averages()
        if not representation.border:
            rows, columns = ({k: self._inverse(m) for k, m in x.items()} for x in (rows, columns))
        scales = unit_inverses(scales, self.damping)
        return UnitFactor(rows, columns, scales, others, representation.border)

    def apply(self, factor: UnitFactor, grads: Params, evidence: Evidence | None = None) -> Params:
        """Solve for each unit.

        Args:
            factor: the result of :meth:`prepare`.
            grads: the gradient.
            evidence: not used.

        Returns:
            The direction. Costs ``i²`` operations for each unit, or a few i for borders.
        """

        def solve(block: str, gradient: LayerGradient) -> LayerGradient:
            turned = block in factor.columns
            m = factor.columns[block] if turned else factor.rows[block]
            g = gradient.matrix().mT if turned else gradient.matrix()
            if factor.border:
                solved = self._quasi_diagonal(m, g)
            else:
                solved = torch.einsum("uij,uj->ui", m, g)
            return LayerGradient(None, solved.mT if turned else solved)

        shapes = {k: BlockShape(1, m.shape[0]) for k, m in factor.rows.items()}
        shapes |= {k: BlockShape(1, m.shape[-1]) for k, m in factor.columns.items()}
        return apply_blocks(grads, shapes, solve, factor.scales, factor.others, self.damping)

    def _inverse(self, m: Tensor) -> Tensor:
        ridge = torch.zeros_like(m[:, 0, 0]) + self.damping
        return damped_factor(m, ridge.maximum(rounding(m)), invert=True)

    def _quasi_diagonal(self, m: Tensor, g: Tensor) -> Tensor:
        """The solution for the diagonal and the last row m of each unit, and its gradient g."""
        diagonal = m[:, 0] + self.damping
        if m.shape[1] == 1:
            return g / diagonal
        bias, slope = g[:, -1:], m[:, 1, :-1] / diagonal[:, -1:]
        rest = diagonal[:, :-1] - slope * m[:, 1, :-1]
        rest = rest.maximum(torch.zeros_like(rest) + self.damping)
        d = (g[:, :-1] - bias * slope) / rest
        return torch.cat([d, bias / diagonal[:, -1:] - (slope * d).sum(1, keepdim=True)], 1)
