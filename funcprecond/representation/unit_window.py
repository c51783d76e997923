"""Gradients of several steps for each output unit of a layer, with their Gram matrices."""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from funcprecond.checks import listed
from funcprecond.layers.block_matrix import join, split
from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.kinds.scale import Scale
from funcprecond.layers.layer_call import LayerUse
from funcprecond.linalg import treemath
from funcprecond.linalg.gradient_rows import put_row, truncate
from funcprecond.linalg.precision import factor_dtype
from funcprecond.tree import Params, state, static

__all__ = ["UnitRows", "UnitWindow", "Units"]


class Units(NamedTuple):
    """How the parameters of a block belong to units: the rows of a (U, D) matrix.

    Attributes:
        block: ``"weight+bias"`` or ``"weight"``.
        use: a use of the layer, or None for a parameter outside of layers, which is a single unit.
    """

    block: str
    use: LayerUse | None

    def matrix(self, vector: Params) -> Tensor:
        """The parameters as (U, D): the weights into each output unit, and then its bias."""
        names, call = self.own, self.use and self.use.call
        x = {k: vector[k].to(factor_dtype(vector[k])) for k in names}
        if isinstance(call, AffineCall):
            rows, groups, transposed = self._layout
            joined = join(x, x, self.block, rows, groups)
            joined = joined.mT if transposed else joined
            return joined.reshape(-1, joined.shape[-1])
        if isinstance(call, Scale):
            return torch.stack([x[k].reshape(-1) for k in names], 1)
        return treemath.ravel(x).unsqueeze(0)

    def split(self, matrix: Tensor, like: Params) -> Params:
        """The inverse of :meth:`matrix`."""
        names, call = self.own, self.use and self.use.call
        if isinstance(call, AffineCall):
            _, _, transposed = self._layout
            return split(matrix.mT.contiguous() if transposed else matrix, like, self.block)
        if isinstance(call, Scale):
            return {k: matrix[:, i].reshape(like[k].shape) for i, k in enumerate(names)}
        return treemath.unravel(matrix.reshape(-1), {k: like[k] for k in names})

    @property
    def own(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(k for k in split_block(self.block) if k)

    @property
    def _layout(self) -> tuple[int, int, bool]:
        """The rows and the groups of the block's matrix, and whether its rows are the inputs."""
        assert self.use is not None
        call: AffineCall = self.use.call
        if call.inputs_first:
            return call.fan_in(self.use.inputs) + (call.bias is not None), 1, True
        return call.fan_out, call.groups, False


@dataclasses.dataclass(frozen=True)
class UnitRows:
    """The rows of all units of a block for Woodbury's formula, with one U for each unit.

    Attributes:
        stacked, dots: (U, R, D) and (U, R, R).
        weights: (R,).
        units: the layout of the block.
        like: tensors with the shapes of the parameters.
    """

    stacked: Tensor
    dots: Tensor
    weights: Tensor
    units: Units
    like: Params

    def gram(self) -> Tensor:
        """``U U^T`` of each unit, (U, R, R)."""
        roots = self.weights.sqrt()
        return self.dots * roots * roots.unsqueeze(1)

    def matvec(self, vector: Params) -> Tensor:
        """``U v`` of each unit, (U, R)."""
        x = self.units.matrix(vector).unsqueeze(-1)
        return (self.stacked @ x).squeeze(-1) * self.weights.sqrt()

    def rmatvec(self, weights: Tensor) -> Params:
        """``U^T y`` of each unit, for y (U, R), shaped like the parameters of the block."""
        y = (weights * self.weights.sqrt()).to(self.stacked.dtype).unsqueeze(-2)
        return self.units.split((y @ self.stacked).squeeze(-2), self.like)


@state
class UnitWindow:
    """R gradients of each output unit of every layer; unused rows are zero.

    The dicts have one entry per block, and are empty until the first gradient.

    Attributes:
        stacked: the gradients of the U units of a block, (U, R, D).
        dots: their inner products, (U, R, R).
        weights: (R,), shared by all units.
        names, shapes: the parameters that this state covers.
    """

    stacked: dict[str, Tensor]
    dots: dict[str, Tensor]
    weights: Tensor
    names: tuple[str, ...] = static()
    shapes: tuple[tuple[int, ...], ...] = static()

    @classmethod
    def init(cls, params: Params, count: int) -> "UnitWindow":
        """Empty dicts, because the layers are found by the first measurement.

        Args:
            params: the parameters.
            count: R.

        Returns:
            The representation.
        """
        weights = treemath.scalar_like(params).expand(count).clone()
        shapes = tuple(tuple(p.shape) for p in params.values())
        return cls({}, {}, weights, tuple(params), shapes)

    @property
    def covered(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that this state covers, by name."""
        return dict(zip(self.names, self.shapes, strict=True))

    def put(
        self, grads: Params, layers: Layers, here: Tensor, weights: Tensor
    ) -> tuple["UnitWindow", list[UnitRows]]:
        """Put a gradient in the place of a row of each unit.

        Args:
            grads: the gradient.
            layers: the layers of the run that gave it. A parameter outside of them is one unit.
            here: (R,), True at the row to replace.
            weights: the new weights of all rows, (R,).

        Returns:
            The new representation, and the rows of each block with a gradient. A block that the run
            did not use gets a row of zeros.
        """
        uses = layers.restrict(self.names).uses
        blocks = [Units(block, of_block[0]) for block, of_block in uses.items()]
        inside = {k for block in uses for k in split_block(block)}
        # What was a layer in another run, and is used by no layer in this one, has no gradient.
        absent = [b for b in self.stacked if self._is_layer(b) and b not in uses]
        absent = [b for b in absent if inside.isdisjoint(split_block(b))]
        known = inside | {k for b in absent for k in split_block(b)}
        blocks += [Units(k, None) for k in self.names if k not in known]
        count = len(self.weights)
        stacked, dots, rows = {}, {}, []
        for units in blocks:
            g = units.matrix(grads)
            old = self.stacked.get(units.block, g.new_zeros((len(g), count, g.shape[1])))
            inner = self.dots.get(units.block, g.new_zeros((len(g), count, count)))
            new = put_row(old, inner, g, here)
            stacked[units.block], dots[units.block] = new
            rows.append(UnitRows(*new, weights, units, grads))
        for block in absent:
            x = self.stacked[block]
            zeros = torch.zeros_like(x[..., 0, :])
            stacked[block], dots[block] = put_row(x, self.dots[block], zeros, here)
        return UnitWindow(stacked, dots, weights, self.names, self.shapes), rows

    def truncated(self, rank: int) -> "UnitWindow":
        """The same matrices with their largest eigenvalues only.

        Args:
            rank: k, the number of eigenvalues that are kept of each unit.

        Returns:
            The representation. Costs an (R, R) eigendecomposition and k R D operations per unit.
        """
        found = {k: truncate(x, self.dots[k], self.weights, rank) for k, x in self.stacked.items()}
        kept = torch.arange(len(self.weights), device=self.weights.device) < rank
        return UnitWindow(
            {k: x for k, (x, _, _) in found.items()},
            {k: x for k, (_, x, _) in found.items()},
            kept.to(self.weights.dtype),
            self.names,
            self.shapes,
        )

    def check_restored(self) -> None:
        """Check that the rows belong to the parameters of :meth:`init`.

        :func:`funcprecond.from_dict` calls this, because an empty state takes rows of any name and
        size.

        Raises:
            ValueError: a block has other parameters or another size.
        """
        shapes, lead = self.covered, self.weights.ndim - 1
        for block, x in self.stacked.items():
            names = [k for k in split_block(block) if k]
            size = sum(math.prod(shapes[k]) for k in names) if {*names} <= {*shapes} else 0
            if x.shape[lead] * x.shape[-1] != size:
                msg = (
                    f"the saved rows of {block!r} are for {x.shape[lead] * x.shape[-1]} entries, "
                    f"which does not fit the parameters {listed(shapes)}: restore them for the "
                    "model that they were saved for"
                )
                raise ValueError(msg)

    def _is_layer(self, block: str) -> bool:
        """Whether a block differs from that of a parameter outside of layers."""
        return "+" in block or self.stacked[block].shape[0] > 1
