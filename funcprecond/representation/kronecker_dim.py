"""One factor for each dimension of a parameter tensor: the mode Grams of Shampoo's family."""

from typing import Any

import torch
from torch import Tensor

from funcprecond.curvature.gradient import unfold_mode
from funcprecond.problem import Params
from funcprecond.representation import average
from funcprecond.representation.diagonal import factor_dtype, zero_weight
from funcprecond.tree import state

__all__ = ["KroneckerDim", "axes_of"]


@state
class KroneckerDim:
    """``S_i = sum unfold_i(G) unfold_i(G)^T`` for the axes i of every parameter.

    Which axes have a factor follows from the shape alone (:func:`axes_of`). A parameter without any
    (a vector, a scalar) keeps the diagonal of its second moment instead.

    Attributes:
        totals: for each parameter a tuple of (n_i, n_i) matrices; divided by ``weight``, the
            factors.
        diagonals: for the other parameters the squares of the entries; divided by ``weight``.
        weight: 0-d, see :mod:`funcprecond.representation.average`.
    """

    totals: dict[str, tuple[Tensor, ...]]
    diagonals: dict[str, Tensor]
    weight: Tensor

    @classmethod
    def init(cls, params: Params) -> "KroneckerDim":
        """Zero."""
        totals, diagonals = {}, {}
        for name, p in params.items():
            dtype = factor_dtype(p)
            if axes := axes_of(p.shape):
                totals[name] = tuple(
                    p.new_zeros((p.shape[i], p.shape[i]), dtype=dtype) for i in axes
                )
            else:
                diagonals[name] = torch.zeros_like(p, dtype=dtype)
        return cls(totals, diagonals, zero_weight(params))

    def accumulate(self, value: Any, decay: average.Decay) -> "KroneckerDim":
        """Take in a measurement that has ``grads`` (an outer product)."""
        totals = {}
        for name, factors in self.totals.items():
            # Upcast before the product: a Gram matrix in bfloat16 has lost its small eigenvalues.
            g = value.grads[name].to(factors[0].dtype)
            totals[name] = tuple(
                average.accumulate(s, mode_gram(g, axis), decay)
                for axis, s in zip(axes_of(g.shape), factors, strict=True)
            )
        diagonals = {
            k: average.accumulate(d, value.grads[k].to(d.dtype).square(), decay)
            for k, d in self.diagonals.items()
        }
        return KroneckerDim(totals, diagonals, average.weight(self.weight, decay))

    def factors(self) -> dict[str, tuple[Tensor, ...]]:
        """The averaged factors."""
        return {k: tuple(s / self.weight for s in t) for k, t in self.totals.items()}


def axes_of(shape: torch.Size) -> tuple[int, ...]:
    """The axes that have a factor: those longer than 1, if there are at least two.

    An axis of length 1 would waste an exponent: an (n, 1) matrix is a vector.
    """
    axes = tuple(i for i, n in enumerate(shape) if n > 1)
    return axes if len(axes) > 1 else ()


def mode_gram(tensor: Tensor, axis: int) -> Tensor:
    """(n_axis, n_axis): the Gram matrix of the slices along ``axis``."""
    rows = unfold_mode(tensor, axis)
    return rows @ rows.T
