"""Parameters that are added to a tensor, ``x + p``: biases, positions, and any other.

A bias is an affine layer with the input 1 (:mod:`funcprecond.layers.kinds.bias`). A table with a
row for each position is an embedding of the positions. Of any other parameter, the gradient of an
example is the sum of the output gradients over the axes that the parameter does not have.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from funcprecond.layers.kinds.bias import Bias
from funcprecond.layers.kinds.embedding import Embedding
from funcprecond.layers.kinds.scale import Scale, aligned_shape
from funcprecond.layers.layer_call import FunctionCall, Names, Recognized
from funcprecond.layers.views import Lookup, as_lookup
from funcprecond.tree import Params

__all__ = ["Added"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Added(Scale):
    """A use of a parameter that is broadcast and added; its units have the input 1."""

    functions = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)

    @classmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        if len(call.args) != 2 or call.kwargs:
            return []
        if not all(isinstance(x, Tensor) for x in call.args):
            return []
        own = [x for x in call.args if names.view(x) is not None]
        if len(own) > 1:
            return []
        shape = torch.broadcast_shapes(*(x.shape for x in call.args))
        if own:
            return cls.of(own[0], shape, names)
        # Rows of a table that all examples share are recorded where they meet the examples.
        shared = [x for x in call.args if names.lookup(x) is not None and x.shape != shape]
        found = [(x, names.lookup(x)) for x in shared if x.shape[-1] == shape[-1]]
        return [_of_rows(rows, shape, x) for x, rows in found if rows is not None]

    @classmethod
    def of(cls, added: Any, shape: torch.Size, names: Names) -> list[Recognized]:
        """The use of a parameter that is added to a tensor, where the sum has the given shape."""
        view = names.view(added)
        if view is None or not view.is_linear:
            return []
        aligned = aligned_shape(added)
        units = [k for k, n in enumerate(aligned) if n != 1]
        if len(aligned) >= len(shape) and 1 not in aligned:
            return []
        if len(units) == 1 and view.is_whole and units[0] in (len(aligned) - 1, 0):
            is_last = units[0] == len(aligned) - 1
            if is_last or len(aligned) == len(shape) - 1:
                call = Bias(weight=view.name, axis=-1 if is_last else 1)
                return [Recognized(call, None)]
        rows = as_lookup(view, added)
        if rows is not None and aligned[-1:] == tuple(shape[-1:]) and units:
            return [_of_rows(rows, shape)]
        if not view.is_whole or not view.is_in_order():
            return []
        return [Recognized(cls(weight=view.name, aligned=aligned), None)]

    def apply(self, params: Params, x: Tensor) -> Tensor:
        return params[self.weight].reshape(self.aligned).expand(self.shape)


def _of_rows(rows: Lookup, shape: torch.Size, tensor: Tensor | None = None) -> Recognized:
    call = Embedding(weight=rows.name, vocabulary=rows.rows, padding=rows.padding)
    return Recognized(call, rows.ids.expand(shape[:-1]), tensor)
