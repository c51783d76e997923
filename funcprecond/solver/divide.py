"""Element-wise division by a power of the curvature's diagonal."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.need import Need
from funcprecond.representation.diagonal import Diagonal
from funcprecond.tracing import multi_tensor
from funcprecond.tree import Params

__all__ = ["Divide"]


@dataclasses.dataclass(frozen=True)
class Divide:
    """``g / (|d|^power + damping)``.

    Attributes:
        damping: added to the power, outside the root.
        power: 1 for a Newton-like step, 1/2 for the AdaGrad family.
    """

    damping: float | Tensor = 1e-8
    power: float = 1.0
    accepts: ClassVar[tuple[type, ...]] = (Diagonal,)
    needs: ClassVar[tuple[Need, ...]] = ()
    staggers: ClassVar[bool] = False

    def init(self, representation: Diagonal) -> Params:
        """Zero: what a step before the first measurement divides by is the damping alone."""
        return {k: torch.zeros_like(t) for k, t in representation.average.total.items()}

    def prepare(self, representation: Diagonal, previous: Params) -> Params:
        """The power of the diagonal."""
        new = representation.diagonal()
        if multi_tensor(new.values()):
            # Those are new: changed in place, not copied twice.
            return {k: d.abs_().pow_(self.power) for k, d in new.items()}
        return {k: d.abs() ** self.power for k, d in new.items()}

    def apply(self, factor: Params, grads: Params, evidence: Evidence | None = None) -> Params:
        """One division an entry."""
        direction = {}
        for name, g in grads.items():
            divisor = factor[name] + self.damping
            own = multi_tensor((divisor, g)) and divisor.dtype == g.dtype
            direction[name] = torch.div(g, divisor, out=divisor if own else None).to(g.dtype)
        return direction
