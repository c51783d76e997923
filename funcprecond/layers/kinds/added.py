"""Parameters that are added to a tensor: ``x + p`` outside of any layer, such as positions.

Such a use is recorded so that products with a Fisher matrix do not have to run the model. It has no
block of its own, unless the parameter is a bias (:mod:`funcprecond.layers.kinds.bias`).
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.layers.kinds.bias import Bias
from funcprecond.layers.layer_call import FunctionCall, LayerCall, Names, Recognized
from funcprecond.tree import Params

__all__ = ["Added"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Added(LayerCall):
    """A use of a parameter that is broadcast and added."""

    functions = (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
    has_block: ClassVar[bool] = False

    @classmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        if len(call.args) != 2 or call.kwargs:
            return []
        own = [x for x in call.args if names.of(x)]
        if len(own) != 1:
            return []
        other = call.args[0] if own[0] is call.args[1] else call.args[1]
        if own[0].ndim == 1 and isinstance(other, Tensor) and other.shape[-1:] == own[0].shape:
            return Bias.of(names, own[0]) if other.ndim > 1 else []
        # The other summand is not the input, because nothing about the parameter depends on it.
        return [Recognized(cls(weight=names.of(own[0]) or ""), own[0])]

    def apply(self, params: Params, x: Tensor) -> Tensor:
        return params[self.weight].expand(self.shape)
