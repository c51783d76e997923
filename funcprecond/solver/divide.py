"""Element-wise division by a power of the curvature's diagonal."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg.differentiable import power
from funcprecond.need import Need
from funcprecond.representation.diagonal import Diagonal
from funcprecond.representation.layer_diagonal import LayerDiagonal
from funcprecond.tracing import multi_tensor
from funcprecond.tree import Params

__all__ = ["Divide"]


@dataclasses.dataclass(frozen=True)
class Divide:
    """``g / (|d|^power + damping)`` for the diagonal d of the curvature.

    Attributes:
        damping: added to the power of d, outside of the root.
        power: 1 for a Newton-like step, 1/2 for the AdaGrad family.
    """

    damping: float | Tensor = 1e-8
    power: float = 1.0
    accepts: ClassVar[tuple[type, ...]] = (Diagonal, LayerDiagonal)
    needs: ClassVar[tuple[Need, ...]] = ()
    staggers: ClassVar[bool] = False

    def init(self, representation: Diagonal | LayerDiagonal) -> Params:
        """Zeros, so that a step before the first measurement divides by the damping alone.

        Args:
            representation: the representation before the first measurement.

        Returns:
            The factor.
        """
        return {k: torch.zeros_like(d) for k, d in representation.diagonal().items()}

    def prepare(self, representation: Diagonal | LayerDiagonal, previous: Params) -> Params:
        """Compute the power of the diagonal.

        Args:
            representation: the curvature.
            previous: not used.

        Returns:
            ``|d|^power``, shaped like the parameters.
        """
        new = representation.diagonal()
        if multi_tensor(new.values()):
            # These tensors are new, so they are changed in place instead of copied twice.
            return {k: d.abs_().pow_(self.power) for k, d in new.items()}
        return {k: power(d.abs(), self.power) for k, d in new.items()}

    def apply(self, factor: Params, grads: Params, evidence: Evidence | None = None) -> Params:
        """Divide the gradient.

        Args:
            factor: the result of :meth:`prepare`.
            grads: the gradient.
            evidence: not used.

        Returns:
            The direction. Costs one division per entry.
        """
        direction = {}
        for name, g in grads.items():
            divisor = factor[name] + self.damping
            own = multi_tensor((divisor, g)) and divisor.dtype == g.dtype
            direction[name] = torch.div(g, divisor, out=divisor if own else None).to(g.dtype)
        return direction
