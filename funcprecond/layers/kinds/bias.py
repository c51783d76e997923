"""Biases alone: an affine layer whose only input is the constant 1.

A bias is a block of its own where its weight is frozen, where the weight also serves other layers
with other biases, or where it is added outside of a layer.
"""

import dataclasses

from torch import Tensor

from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.layer_call import FunctionCall, Names, Recognized
from funcprecond.layers.place import Place
from funcprecond.tree import Params

__all__ = ["Bias"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bias(AffineCall):
    """A use of a (o,) parameter that is added to every position.

    Attributes:
        axis: the axis of the output that the parameter belongs to: 1, or -1 for the last.
    """

    axis: int = -1

    @classmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        return []

    @classmethod
    def of(cls, names: Names, bias: object, axis: int = -1) -> list[Recognized]:
        """The use of a bias, for the kinds whose weight is not a parameter."""
        name = names.of(bias)
        return [Recognized(cls(weight=name, axis=axis), None)] if name else []

    def apply(self, params: Params, x: Tensor) -> Tensor:
        bias = params[self.weight].reshape(-1)
        after = 0 if self.axis == -1 else len(self.shape) - 2
        return bias.reshape(-1, *[1] * after).expand(self.shape)

    def takes(self, place: Place) -> bool:
        return place.axis == 0 or self.axis == -1

    @property
    def fan_out(self) -> int:
        return self.shape[self.axis]

    def fan_in(self, x: Tensor) -> int:
        return 1

    def cut_inputs(self, x: Tensor) -> Tensor:
        rows = x.reshape(x.shape[0], -1, 1) if self.axis == -1 else x.flatten(2).mT
        ones = rows.new_ones(())
        positions = rows.shape[1] // (self.fan_out if self.axis == -1 else 1)
        return ones.expand(rows.shape[0], positions, 1)

    def cut_grads(self, g: Tensor, x: Tensor) -> Tensor:
        return super().cut_grads(g if self.axis == -1 else g.flatten(3).mT, x)
