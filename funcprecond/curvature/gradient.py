"""The batched empirical Fisher matrix: the outer product of a mini-batch gradient with itself.

It costs nothing beside the gradient. Accumulated over steps it is the second moment that AdaGrad,
Adam, Shampoo and CASPR take the root of.
"""

import dataclasses
from typing import ClassVar

import torch

from funcprecond.linalg.precision import factor_dtype
from funcprecond.need import Need
from funcprecond.tree import Params, state

__all__ = ["BatchGradient", "OuterProduct"]


@state
class OuterProduct:
    """``g g^T`` for each parameter, never formed; its entries are in float32 or wider.

    Attributes:
        grads: the factor ``g``, shaped like the parameters.
    """

    grads: Params

    def diagonal(self) -> Params:
        """The squares of the entries."""
        return {k: g.to(factor_dtype(g)).square() for k, g in self.grads.items()}

    def to_dense(self) -> Params:
        """(n, n) for a parameter of n entries."""
        flat = {k: g.to(factor_dtype(g)).reshape(-1) for k, g in self.grads.items()}
        return {k: torch.outer(g, g) for k, g in flat.items()}


@dataclasses.dataclass(frozen=True)
class BatchGradient(Need):
    """The gradient that ``update`` was given, as a curvature matrix: nothing is measured."""

    gives: ClassVar[type] = OuterProduct
