r"""Bilinear layers ``z_o = x^T W_o y + b_o``, which are affine in the outer product of x and y."""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.kinds.bias import Bias
from funcprecond.layers.layer_call import FunctionCall, Names, Recognized
from funcprecond.tree import Params

__all__ = ["Bilinear"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bilinear(AffineCall):
    """A use of an (o, p, q) weight. Its input rows are outer products of x and y, of length p q."""

    functions = (F.bilinear, torch.bilinear)
    first_axis: ClassVar[bool] = False

    @classmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        x, y = call.argument(0, "input1"), call.argument(1, "input2")
        weight = names.of(call.argument(2, "weight"))
        if x.ndim < 2:
            return []
        if not weight:
            return Bias.of(names, call.argument(3, "bias"))
        products = x.unsqueeze(-1) * y.unsqueeze(-2)
        found = cls(weight=weight, bias=names.of(call.argument(3, "bias")))
        return [Recognized(found, products.flatten(-2))]

    def apply(self, params: Params, x: Tensor) -> Tensor:
        bias = None if self.bias is None else params[self.bias]
        return F.linear(x, params[self.weight].flatten(1), bias)
