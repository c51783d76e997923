"""The batched empirical Fisher matrix: the outer product of a mini-batch gradient with itself.

It costs nothing in addition to the gradient. Accumulated over steps, it is the second moment whose
inverse root AdaGrad, Adam, Shampoo and CASPR approximate.
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
    """``g g^T`` for each parameter, which is never formed; its entries are in float32 or wider.

    Attributes:
        grads: the factor ``g``, shaped like the parameters.
    """

    grads: Params

    def diagonal(self) -> Params:
        """The diagonal of ``g g^T``, which is the square of ``g`` entry by entry."""
        return {k: g.to(factor_dtype(g)).square() for k, g in self.grads.items()}

    def to_dense(self) -> Params:
        """``g g^T`` as a dense matrix, (n, n) for a parameter of n entries."""
        flat = {k: g.to(factor_dtype(g)).reshape(-1) for k, g in self.grads.items()}
        return {k: torch.outer(g, g) for k, g in flat.items()}


@dataclasses.dataclass(frozen=True)
class BatchGradient(Need):
    """The gradient that ``update`` receives, as a curvature matrix; nothing else is measured.

    :func:`funcprecond.compose` turns this gradient into an :class:`OuterProduct`.
    """

    gives: ClassVar[type] = OuterProduct
