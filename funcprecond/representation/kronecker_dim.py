"""One factor for each dimension of a parameter tensor: the mode Grams of Shampoo's family."""

from typing import Any

import torch
from torch import Tensor

from funcprecond.linalg.axes import grams
from funcprecond.linalg.batching import over_stacks
from funcprecond.linalg.blocking import Blocking
from funcprecond.linalg.precision import factor_dtype
from funcprecond.representation import average
from funcprecond.representation.diagonal import zero_weight
from funcprecond.tree import Params, state, static

__all__ = ["KroneckerDim", "axes_of"]


@state
class KroneckerDim:
    """``S_i = sum unfold_i(G) unfold_i(G)^T`` for the axes i of every block of every parameter.

    Blocks and their axes follow from the shapes alone, see
    :class:`funcprecond.linalg.blocking.Blocking`. A parameter without factors (a vector, a
    scalar) keeps the diagonal of its second moment instead.

    Attributes:
        totals: for each block a tuple of (n_i, n_i) matrices; divided by ``weight``, the factors.
        diagonals: for the other parameters the squares of the entries; divided by ``weight``.
        weight: 0-d, see :mod:`funcprecond.representation.average`.
        blocking: how parameters are cut into blocks.
    """

    totals: dict[str, tuple[Tensor, ...]]
    diagonals: dict[str, Tensor]
    weight: Tensor
    blocking: Blocking = static(default=Blocking())

    @classmethod
    def init(cls, params: Params, blocking: Blocking | None = None) -> "KroneckerDim":
        """Zero."""
        blocking = Blocking() if blocking is None else blocking
        totals, diagonals = {}, {}
        for name, p in params.items():
            dtype = factor_dtype(p)
            if not blocking.has_factors(p.shape):
                diagonals[name] = torch.zeros_like(p, dtype=dtype)
                continue
            for block, x in blocking.split(name, p).items():
                sizes = [x.shape[i] for i in blocking.axes(x.shape)]
                totals[block] = tuple(p.new_zeros((n, n), dtype=dtype) for n in sizes)
        return cls(totals, diagonals, zero_weight(params), blocking)

    def accumulate(self, value: Any, decay: average.Decay) -> "KroneckerDim":
        """Take in a measurement that has ``grads`` (an outer product)."""
        blocks, diagonals, at = {}, {}, average.at(self.weight, decay)
        for name, g in value.grads.items():
            # Upcast before the product: a Gram matrix in bfloat16 has lost its small eigenvalues.
            g = g.to(factor_dtype(g))
            if name in self.diagonals:
                diagonals[name] = average.accumulate(self.diagonals[name], g.square(), at)
            else:
                blocks |= self.blocking.split(name, g)
        names, layout = list(blocks), self.blocking
        new = over_stacks(
            grams,
            [blocks[k] for k in names],
            static=[layout.axes(blocks[k].shape) for k in names],
        )
        totals = {
            name: tuple(
                average.accumulate(s, c, at) for s, c in zip(self.totals[name], found, strict=True)
            )
            for name, found in zip(names, new, strict=True)
        }
        weight = average.weight(self.weight, at)
        return KroneckerDim(totals, diagonals, weight, self.blocking)

    def factors(self) -> dict[str, tuple[Tensor, ...]]:
        """The averaged factors."""
        return {k: tuple(s / self.weight for s in t) for k, t in self.totals.items()}


def axes_of(shape: torch.Size) -> tuple[int, ...]:
    """The axes that have a factor: those longer than 1, if there are two and no axis is empty.

    An axis of length 1 would waste an exponent: an (n, 1) matrix is a vector.
    """
    axes = tuple(i for i, n in enumerate(shape) if n > 1)
    return axes if len(axes) > 1 and 0 not in shape else ()


def mode_gram(tensor: Tensor, axis: int) -> Tensor:
    """(n_axis, n_axis): the Gram matrix of the slices along ``axis``."""
    return grams(tensor, (axis,))[0]
