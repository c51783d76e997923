"""Element-wise division by a power of the curvature's diagonal."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.problem import Params
from funcprecond.representation.diagonal import Diagonal

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

    def init(self, representation: Diagonal) -> Params:
        """Zero: what a step before the first measurement divides by is the damping alone."""
        return {k: torch.zeros_like(t) for k, t in representation.total.items()}

    def prepare(self, representation: Diagonal, previous: Params) -> Params:
        """The power of the diagonal."""
        return {k: d.abs() ** self.power for k, d in representation.diagonal().items()}

    def apply(self, factor: Params, grads: Params) -> Params:
        """One division an entry."""
        return {k: (g / (factor[k] + self.damping)).to(g.dtype) for k, g in grads.items()}
