"""Linear layers, in each form that models use: ``F.linear``, ``x @ W`` and ``addmm``."""

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.layers.kinds.added import Added
from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.kinds.contraction import Contraction, scaled
from funcprecond.layers.kinds.expert import Expert
from funcprecond.layers.layer_call import FunctionCall, LayerCall, Names, Recognized
from funcprecond.layers.views import View
from funcprecond.tree import Params

__all__ = ["Linear"]

PRODUCTS = (
    *(torch.matmul, torch.mm, torch.bmm, torch.mv),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.__matmul__),
)
ADDED_PRODUCTS = (torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(AffineCall):
    """A use of a weight: ``z = a W^T + b`` if it is stored as (o, i), ``z = a W + b`` if as (i, o).

    Attributes:
        stored_inputs_first: whether the weight is stored as (i, o).
        part: if only a part of the rows of the weight is used, the index of the first one, the
            number of those that are used, and that of all rows.
    """

    stored_inputs_first: bool = False
    part: tuple[int, int, int] | None = None

    functions = (F.linear, *PRODUCTS, *ADDED_PRODUCTS)
    first_axis: ClassVar[bool] = False

    @classmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        bias, scale = None, 1
        if call.function is F.linear:
            x, matrix = call.argument(0, "input"), call.argument(1, "weight")
            bias = call.argument(2, "bias")
        elif call.function in ADDED_PRODUCTS:
            batched = "batch" if call.function in (torch.baddbmm, Tensor.baddbmm) else "mat"
            bias, x, matrix = (
                call.argument(i, n) for i, n in enumerate(("input", f"{batched}1", f"{batched}2"))
            )
            scale = call.argument(4, "alpha", 1)
            bias = bias if call.argument(3, "beta", 1) == 1 else None
        else:
            second = next((call.kwargs[k] for k in ("mat2", "other", "vec") if k in call.kwargs), 0)
            x, matrix = call.argument(0, "input"), call.argument(1, "tensor", second)
        if not isinstance(matrix, Tensor) or not isinstance(x, Tensor):
            return []
        view = names.view(matrix)
        length = matrix.shape[0 if call.function is F.linear else -1] if matrix.ndim > 1 else 1
        added = Added.of(bias, torch.Size((*x.shape[:-1], length)), names)
        if view is not None and names.view(x) is None:
            used = cls.of(view, x, scale, inputs_first=call.function is not F.linear)
            return _with_bias(used, view, names.view(bias), added)
        if view is None and (view := names.view(x)) is not None and call.function is not F.linear:
            return Contraction.of_product(view, matrix, scale, weight_first=True)
        return added

    @classmethod
    def of(cls, view: View, x: Tensor, scale: Any, inputs_first: bool) -> Recognized | None:
        """The use of a view as the matrix in ``x W^T`` or, with the inputs first, in ``x W``."""
        rank = len(view.axes)
        if rank == 2 and view.index is not None:
            return Expert.of(view, x, scale, inputs_first)
        if rank != 2 or x.ndim < 2 or view.index is not None:
            found = Contraction.of_product(view, x, scale, transposed=not inputs_first)
            return found[0] if found else None
        is_transposed = view.is_transposed()
        if is_transposed is None:
            found = Contraction.of_product(view, x, scale, transposed=not inputs_first)
            return found[0] if found else None
        part = None
        if view.part is not None:
            start, total = view.part
            rest = view.shape[is_transposed] // view.sizes[0]
            part = (start * rest, view.sizes[0] * rest, total * rest)
        call = cls(weight=view.name, stored_inputs_first=inputs_first != is_transposed, part=part)
        return Recognized(call, scaled(x, view.factor * scale))

    def apply(self, params: Params, x: Tensor) -> Tensor:
        weight = params[self.weight]
        bias = None if self.bias is None else params[self.bias]
        matrix = weight.reshape(self._rows(weight, x), -1)
        if self.part is not None:
            start, length, _ = self.part
            matrix = matrix[start : start + length]
            bias = bias if bias is None or self.inputs_first else bias[start : start + length]
        return F.linear(x, matrix.mT if self.stored_inputs_first else matrix, bias)

    def _rows(self, weight: Tensor, x: Tensor) -> int:
        if self.part is not None:
            return self.part[2]
        return x.shape[-1] if self.stored_inputs_first else self.shape[-1]

    def combines_with(self, other: LayerCall) -> bool:
        if isinstance(other, Linear):
            other = dataclasses.replace(other, part=self.part)
        return super().combines_with(other)

    @property
    def inputs_first(self) -> bool:
        return self.stored_inputs_first

    @property
    def rows_are_given(self) -> bool:
        return not self.stored_inputs_first and self.part is None

    @property
    def fan_out(self) -> int:
        return self.shape[-1] if self.part is None or self.inputs_first else self.part[2]

    def fan_in(self, x: Tensor) -> int:
        return self.part[2] if self.part is not None and self.inputs_first else x.shape[-1]

    def cut_inputs(self, x: Tensor) -> Tensor:
        rows = super().cut_inputs(x)
        return self._padded(rows) if self.inputs_first else rows

    def cut_grads(self, g: Tensor, x: Tensor) -> Tensor:
        rows = super().cut_grads(g, x)
        return rows if self.inputs_first else self._padded(rows)

    def _padded(self, rows: Tensor) -> Tensor:
        """Rows for the whole weight, which are zero for the part that is not used."""
        if self.part is None:
            return rows
        start, length, total = self.part
        return F.pad(rows, (start, total - start - length))


def _with_bias(
    used: Recognized | None, view: View, bias: View | None, added: list[Recognized]
) -> list[Recognized]:
    """A use of a weight and of its bias, as one layer if both fit each other."""
    if used is None or used.input is None:
        return added
    call = used.call
    fits = (
        isinstance(call, Linear)
        and bias is not None
        and bias.is_linear
        and bias.axes == ((0,),)
        and bias.part == view.part
        and not (bias.part and call.inputs_first)
        and view.sizes[0] == (used.input.shape[-1] if call.inputs_first else bias.sizes[0])
    )
    if not fits or bias is None:
        return [used, *added]
    return [used._replace(call=dataclasses.replace(call, bias=bias.name))]
