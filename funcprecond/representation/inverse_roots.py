"""Roots of the inverses of Kronecker factors, which follow them by matrix products alone."""

import dataclasses
import math
from typing import Literal

from torch import Tensor

from funcprecond.layers.blocks import Layers
from funcprecond.layers.kinds.scale import Scale
from funcprecond.linalg.inverse_free import mean_diagonal, moved, projected, root_like, squared
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.representation.layer_averages import parameters
from funcprecond.representation.unit_blocks import UnitBlocks
from funcprecond.tree import Params, state, static

__all__ = ["InverseRoots", "Structure"]

Structure = Literal["dense", "diagonal"]
Pair = tuple[Tensor, Tensor]


@state
class InverseRoots:
    """Roots C and K with ``C C^T ⊗ K K^T`` close to the inverse of a layer's curvature.

    The dicts are empty until the first measurement. A layer that a measurement leaves out stays as
    it is. Where a batch uses a parameter in another layer than before, the roots of the new layer
    start from I.

    Attributes:
        left, right: C, (o, o), and K, (i + 1, i + 1), for each block, on the sides of the rows and
            of the columns of its matrix; with a leading axis for groups. A diagonal root is stored
            as a row, (1, o).
        left_momentum, right_momentum: the running means of their steps; empty without momentum.
        rest: the averaged curvature of norm layers, and of parameters outside of layers.
        structure: whether roots are "dense" or "diagonal"; that of an embedding's factor of indices
            is diagonal in either case.
    """

    left: dict[str, Tensor]
    right: dict[str, Tensor]
    left_momentum: dict[str, Tensor]
    right_momentum: dict[str, Tensor]
    rest: UnitBlocks
    structure: Structure = static(default="dense")

    @classmethod
    def init(cls, params: Params, structure: Structure = "dense") -> "InverseRoots":
        """Empty dicts.

        Args:
            params: the parameters.
            structure: see the attribute.

        Returns:
            The representation.
        """
        return cls({}, {}, {}, {}, UnitBlocks.init(params), structure)

    def follow(
        self,
        value: Layers,
        damping: float | Tensor,
        rate: float | Tensor,
        momentum: float | Tensor | None,
        normalize: bool,
    ) -> "InverseRoots":
        """The roots after one step along a measurement, see :func:`funcprecond.singd`.

        Args:
            value: the layer statistics.
            damping: λ.
            rate: β, also the weight of the measurement in ``rest``.
            momentum: α; None for IKFAC, whose two roots do not depend on each other.
            normalize: see :func:`funcprecond.linalg.inverse_free.moved`.

        Returns:
            The new representation. Costs up to four products for each root.
        """
        value = value.restrict(self.rest.names)
        norms = {k: u for k, u in value.uses.items() if isinstance(u[0].call, Scale)}
        layers = {k: u for k, u in value.uses.items() if k not in norms}
        rest = self.rest.accumulate(dataclasses.replace(value, uses=norms), 1 - rate)
        if not rest.normalizers:
            # A restored state is checked by these names.
            zero = value.scale.new_zeros(())
            rest = dataclasses.replace(rest, normalizers={k: zero.clone() for k in rest.names})
        factors = self._factors(dataclasses.replace(value, uses=layers, others={}))
        taken = {name for block in layers for name in parameters(block)}
        left, right, left_momentum, right_momentum = (
            {k: x for k, x in part.items() if k in layers or taken.isdisjoint(parameters(k))}
            for part in (self.left, self.right, self.left_momentum, self.right_momentum)
        )
        for block in layers:
            pair = factors.left[block], factors.right[block]
            roots = self._root(left.get(block), pair[0]), self._root(right.get(block), pair[1])
            steps = _steps(pair, roots, damping, coupled=momentum is not None)
            if momentum is not None:
                old = left_momentum.get(block), right_momentum.get(block)
                steps = _averaged(old[0], steps[0], momentum), _averaged(old[1], steps[1], momentum)
                left_momentum[block], right_momentum[block] = steps
            left[block], right[block] = (
                moved(r, m, rate, normalize) for r, m in zip(roots, steps, strict=True)
            )
        return InverseRoots(left, right, left_momentum, right_momentum, rest, self.structure)

    def check_restored(self) -> None:
        """Check that the roots belong to the parameters of :meth:`init`.

        Raises:
            ValueError: a block has other parameters or another size, or a parameter has none.
        """
        self.rest.check_restored()
        for block, c in self.left.items():
            shape = (c.shape[-1], self.right[block].shape[-1])
            if self.rest.entries(block) % math.prod(shape):
                shapes = {k: self.rest.covered[k] for k in parameters(block)}
                msg = (
                    f"the saved roots of {block!r} are for matrices of shape {shape}, but the "
                    f"parameters have the shapes {shapes}: restore them for the model that they "
                    "were saved for"
                )
                raise ValueError(msg)

    def _factors(self, value: Layers) -> KroneckerIO:
        """K-FAC's factors of one batch; of long axes the diagonal alone, if no more is needed."""
        zero = value.scale.new_zeros(())
        limit = 1 if self.structure == "diagonal" else 0
        empty = KroneckerIO({}, {}, {}, {}, zero, self.rest.names, thin=True, max_dim=limit)
        return empty.with_cotangents(value).with_inputs(value.uses, value.sharing)

    def _root(self, old: Tensor | None, factor: Tensor) -> Tensor:
        start = root_like(factor, self.structure == "diagonal")
        return start if old is None or old.shape != start.shape else old


def _steps(factors: Pair, roots: Pair, damping: float | Tensor, coupled: bool) -> Pair:
    """``½ (t_H H + λ t_R R^T R - I)`` of both roots; t are means of the other root if coupled."""
    h = [projected(x, r) for x, r in zip(factors, roots, strict=True)]
    squares = [squared(r) for r in roots]
    found = []
    for i, other in ((0, 1), (1, 0)):
        weight = mean_diagonal(h[other]) if coupled else 1.0
        ridge = damping * (mean_diagonal(squares[other]) if coupled else 1.0)
        one = root_like(squares[i], False) if squares[i].shape[-2] > 1 else 1.0
        found.append((weight * h[i] + ridge * squares[i] - one) / 2)
    return found[0], found[1]


def _averaged(old: Tensor | None, new: Tensor, momentum: float | Tensor) -> Tensor:
    return new if old is None or old.shape != new.shape else momentum * old + new
