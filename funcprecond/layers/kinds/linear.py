"""Linear layers, in each form that models use: ``F.linear``, ``x @ W`` and ``addmm``."""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.kinds.bias import Bias
from funcprecond.layers.layer_call import FunctionCall, Names, Recognized
from funcprecond.tree import Params

__all__ = ["Linear"]

PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
ADDED_PRODUCTS = (torch.addmm, torch.Tensor.addmm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(AffineCall):
    """A use of a weight: ``z = a W^T + b`` if it is stored as (o, i), ``z = a W + b`` if as (i, o).

    Attributes:
        stored_inputs_first: whether the weight is stored as (i, o).
    """

    stored_inputs_first: bool = False

    functions = (F.linear, *PRODUCTS, *ADDED_PRODUCTS)
    first_axis: ClassVar[bool] = False

    @classmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        bias = None
        if call.function is F.linear:
            x, matrix = call.argument(0, "input"), call.argument(1, "weight")
            bias = call.argument(2, "bias")
            inputs_are_columns = False
        elif call.function in ADDED_PRODUCTS:
            if call.argument(3, "beta", 1) != 1 or call.argument(4, "alpha", 1) != 1:
                return []
            bias, x, matrix = (call.argument(i, n) for i, n in enumerate(("input", "mat1", "mat2")))
            inputs_are_columns = True
        else:
            x, matrix = call.argument(0, "input"), call.argument(1, "other")
            matrix = call.argument(1, "mat2") if matrix is None else matrix
            inputs_are_columns = True
        if not isinstance(matrix, Tensor) or matrix.ndim != 2 or x.ndim < 2:
            return []
        if bias is not None and names.of(bias) and bias.shape != (_outputs(matrix, call),):
            return []
        if weight := names.of(matrix):
            inputs_first = inputs_are_columns
        elif weight := names.of_transpose(matrix):
            inputs_first = not inputs_are_columns
        else:
            return Bias.of(names, bias)
        found = cls(weight=weight, bias=names.of(bias), stored_inputs_first=inputs_first)
        return [Recognized(found, x)]

    def apply(self, params: Params, x: Tensor) -> Tensor:
        weight = params[self.weight]
        bias = None if self.bias is None else params[self.bias]
        return F.linear(x, weight.mT if self.stored_inputs_first else weight, bias)

    @property
    def inputs_first(self) -> bool:
        return self.stored_inputs_first

    @property
    def rows_are_given(self) -> bool:
        return not self.stored_inputs_first


def _outputs(matrix: Tensor, call: FunctionCall) -> int:
    return matrix.shape[0 if call.function is F.linear else 1]
