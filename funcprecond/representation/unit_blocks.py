"""The blocks of a curvature matrix for the incoming parameters of each unit."""

import dataclasses
import math
from typing import ClassVar, Self

from torch import Tensor

from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.example_gradients import ExampleGradients
from funcprecond.layers.kinds.scale import Scale
from funcprecond.layers.layer_call import LayerUse
from funcprecond.layers.unit_moments import unit_borders, unit_moments
from funcprecond.representation.average import Decay
from funcprecond.representation.layer_averages import LayerAverages
from funcprecond.tree import Params, state, static

__all__ = ["UnitBlocks"]

# The largest number of entries of the blocks of one layer: 1 GiB in float32.
MAX_ENTRIES = 2**28


@state
class UnitBlocks(LayerAverages):
    """The exact curvature of each output unit, over its weights and, as the last one, its bias.

    Attributes:
        normalizers, names, shapes: see :class:`funcprecond.representation.LayerAverages`.
        rows: for each layer of U units (output channels of a convolution) with i inputs and a bias
            each, (U, i + 1, i + 1), if the units are the rows of its matrix ``[W | b]``. If only a
            ``border`` is kept, (U, 2, i + 1): the diagonal, and the last row.
        columns: the same for a layer whose units are the columns, because axis 0 of its weight is
            the axis of the inputs.
        scales: for a norm layer of U units, (U, 2, 2), or (U, 1, 1) without a bias.
        others: the diagonal of the curvature for embeddings, and for parameters that no layer
            covers.
        border: whether only the diagonal and the row of the bias are kept of rows and columns.
    """

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    scales: dict[str, Tensor]
    others: dict[str, Tensor]
    border: bool = static(default=False)

    accepts: ClassVar[type] = Layers
    parts: ClassVar[tuple[str, ...]] = ("rows", "columns", "scales", "others")

    @classmethod
    def init(cls, params: Params, border: bool = False) -> Self:
        """Empty dicts.

        Args:
            params: the parameters.
            border: see the attribute.

        Returns:
            The representation.
        """
        return dataclasses.replace(super().init(params), border=border)

    def accumulate(self, value: Layers, decay: Decay) -> "UnitBlocks":
        """Include a measurement of the layers.

        Args:
            value: the layer statistics, whose rows belong to single examples.
            decay: see :mod:`funcprecond.representation.average`.

        Returns:
            The new representation. Costs ``N o i²`` operations for each layer, or ``N o i`` for
            borders.

        Raises:
            ValueError: the blocks of a layer would have more than 2^28 entries.
        """
        value = value.restrict(self.names)
        found: dict[str, dict[str, Tensor]] = {part: {} for part in self.parts}
        found["others"] |= {k: d * value.scale for k, d in value.others.items()}
        for block, uses in value.uses.items():
            call, scale = uses[0].call, value.scale
            if isinstance(call, Scale):
                bias = split_block(block)[1] is not None
                found["scales"][block] = call.unit_blocks(uses, bias, scale)
            elif call.one_hot:
                squares = call.second_moments(uses, False)
                found["others"][block] = squares.reshape(self.covered[block]) * scale
            else:
                side = found["columns" if call.inputs_first else "rows"]
                side[block] = self._moments(block, uses) * scale
        return self.include(decay, **found)

    def _moments(self, block: str, uses: tuple[LayerUse, ...]) -> Tensor:
        weight, bias = split_block(block)
        rows = ExampleGradients.of(uses, weight, bias, self.covered[weight])
        if self.border:
            return unit_borders(rows)
        length = rows.inputs.shape[-1]
        shape = (self.entries(block) // length, length, length)
        if math.prod(shape) > MAX_ENTRIES:
            msg = (
                f"the curvature of the units of {block!r} would have the shape {shape}, and the "
                f"limit is {MAX_ENTRIES} entries: pass quasi_diagonal=True, or give this layer "
                "another method, such as fp.kfac, with fp.partition"
            )
            raise ValueError(msg)
        return unit_moments(rows)

    def fits(self, block: str) -> bool:
        lead = self.normalizers[block].ndim  # the axes of a vmap
        if block in self.others:
            return self.others[block].shape[lead:] == self.covered[block]
        (units,) = (x[block] for x in (self.rows, self.columns, self.scales) if block in x)
        return units.shape[lead] * units.shape[-1] == self.entries(block)
