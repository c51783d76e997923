"""The diagonal of a Fisher matrix, from the layers' inputs and output gradients."""

import dataclasses
from typing import ClassVar, Self

from torch import Tensor

from funcprecond.layers.blocks import Layers
from funcprecond.linalg import treemath
from funcprecond.representation.average import Decay
from funcprecond.representation.layer_averages import LayerAverages
from funcprecond.tree import Params, state

__all__ = ["LayerDiagonal"]


@state
class LayerDiagonal(LayerAverages):
    """The sum of the squared gradients of single examples, for each entry of each parameter.

    Attributes:
        normalizers, names, shapes: see :class:`funcprecond.representation.LayerAverages`. Every
            parameter is a block of its own.
        values: the totals, shaped like the parameters, in float32 or wider.
    """

    values: dict[str, Tensor]

    accepts: ClassVar[type] = Layers
    parts: ClassVar[tuple[str, ...]] = ("values",)

    @classmethod
    def init(cls, params: Params) -> Self:
        """A diagonal of zeros.

        Args:
            params: the parameters.

        Returns:
            The representation.
        """
        zeros = treemath.zeros_like(params)
        normalizers = {k: x.new_zeros(()) for k, x in zeros.items()}
        return dataclasses.replace(super().init(params), normalizers=normalizers, values=zeros)

    def accumulate(self, value: Layers, decay: Decay) -> "LayerDiagonal":
        """Include a measurement of the layers.

        Args:
            value: the layer statistics, whose rows belong to single examples.
            decay: see :mod:`funcprecond.representation.average`.

        Returns:
            The new representation. Costs one product of the squares of a layer's inputs and output
            gradients; where an example has several positions, its gradient is formed.
        """
        value = value.restrict(self.names)
        found = {k: d * value.scale for k, d in value.others.items()}
        for uses in value.uses.values():
            diagonal = uses[0].call.diagonal(uses, self.values)
            found |= {k: d * value.scale for k, d in diagonal.items()}
        return self.include(decay, values=found)

    def diagonal(self) -> Params:
        """The averaged diagonal, shaped like the parameters."""
        return self.averages()[0]

    def fits(self, block: str) -> bool:
        return self.values[block].shape[self.normalizers[block].ndim :] == self.covered[block]
