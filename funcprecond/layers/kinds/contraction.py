"""Linear maps whose weight has any number of axes: ``einsum``, ``bmm``, ``W @ x``, ``x @ w``.

The axes of the weight are of three kinds. *Inputs* are summed over, *outputs* are axes of the
result, and *batched* axes are both axes of the input and of the result, as the experts of a batched
product are. The weight is a matrix for each entry of its leading axes, the *groups*: each group is
a linear layer of its own. Neighbouring axes of inputs, and of outputs, are merged in this matrix.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import einops
import torch
from torch import Tensor

from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.layer_call import FunctionCall, LayerUse, Names, Recognized, Sharing
from funcprecond.layers.place import Place
from funcprecond.layers.views import View
from funcprecond.tree import Params

__all__ = ["Contraction", "scaled"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contraction(AffineCall):
    """A use of a weight that is summed over some of its axes with an input.

    The axes of the input and of the result are written as in einops. Axis k of the weight is
    ``"ak"``, several of them may be merged, as in ``"(a0 a1)"``, and ``"p0"``, ``"p1"`` are the
    positions, which the weight does not have.

    Attributes:
        input_axes, output_axes: the axes of the input and of the result.
        sizes: the name and the length of each axis of the weight, without those of length 1.
        group_axes, output_names, input_names: the axes of the weight that count the groups, the
            outputs and the inputs.
        stored_inputs_first: whether the inputs come before the outputs in the weight.
    """

    input_axes: tuple[str, ...]
    output_axes: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]
    group_axes: tuple[str, ...]
    output_names: tuple[str, ...]
    input_names: tuple[str, ...]
    stored_inputs_first: bool

    functions = (torch.einsum,)

    @classmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        equation, *operands = call.args
        if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
            operands = list(operands[0])
        if not isinstance(equation, str) or len(operands) != 2:
            return []
        own = [k for k, x in enumerate(operands) if names.view(x) is not None]
        if len(own) != 1:
            return []
        axes = _axes_of(equation, [x.ndim for x in operands])
        own = own[0]
        view, x = names.view(operands[own]), operands[1 - own]
        if view is None:
            return []
        return cls.of(view, x, axes[own], axes[1 - own], axes[2], view.factor)

    @classmethod
    def of_product(
        cls,
        view: View,
        x: Tensor,
        scale: Any = 1,
        *,
        weight_first: bool = False,
        transposed: bool = False,
    ) -> list[Recognized]:
        """The use of a view in a product of matrices or batches of matrices, as by ``matmul``.

        Args:
            view: the view.
            x: the other factor.
            scale: a number by which the product is multiplied.
            weight_first: whether the product is ``W @ x``, and not ``x @ W``.
            transposed: whether the last two axes of the view are exchanged before.
        """
        ranks = (len(view.axes), x.ndim)
        if 0 in ranks:
            return []
        # A vector has only the axis that is summed over.
        weight = ["o", "i"] if weight_first or transposed else ["i", "o"]
        weight = weight if ranks[0] > 1 else ["i"]
        other = ["i", "m"] if weight_first else ["m", "i"]
        other = other if ranks[1] > 1 else ["i"]
        lengths = ranks[0] - len(weight), ranks[1] - len(other)
        batch = [f"b{k}" for k in reversed(range(max(lengths)))]
        of_weight, of_other = (batch[len(batch) - n :] for n in lengths)
        shape = view.shape
        of_weight = ["1" if shape[k] == 1 else b for k, b in enumerate(of_weight)]
        of_other = [
            "1" if x.shape[k] == 1 and b in of_weight else b for k, b in enumerate(of_other)
        ]
        result = batch + (["o", "m"] if weight_first else ["m", "o"])
        result = [a for a in result if a in batch or a in weight or a in other]
        return cls.of(view, x, of_weight + weight, of_other + other, result, scale * view.factor)

    @classmethod
    def of(
        cls,
        view: View,
        x: Tensor,
        weight: Sequence[str],
        other: Sequence[str],
        result: Sequence[str],
        factor: Any,
    ) -> list[Recognized]:
        """The use of a view in the product with the named axes; "1" is an axis of length 1.

        Args:
            view: the view.
            x: the other factor.
            weight, other, result: the names of the axes of the view, of the other factor, and of
                the product.
            factor: a number by which the product is multiplied.
        """
        named = [[a for a in axes if a != "1"] for axes in (weight, other, result)]
        own, given, found = map(set, named)
        is_sum = own - given - found or given - own - found
        if not view.is_whole or is_sum or any(len(a) != len({*a}) for a in named):
            return []
        kind = {a: "batch" if a in given & found else "in" if a in given else "out" for a in own}
        kinds, merged = {}, {}
        for a, axes in zip(weight, view.axes, strict=True):
            axes = [k for k in axes if view.sizes[k] != 1]
            merged[a] = [f"a{k}" for k in axes]
            kinds |= {k: kind.get(a, "batch") for k in axes}
        order = sorted(kinds)
        split = _matrix_of([kinds[k] for k in order])
        if split is None:
            return []
        groups, rows, columns = (tuple(f"a{k}" for k in order[part]) for part in split)
        inputs_first = bool(columns) and kinds[order[-1]] == "out" and bool(rows)
        has_inputs = kinds[order[-1]] == "in" if order else False
        if not inputs_first and not has_inputs:
            rows, columns = rows + columns, ()
        positions = {a: f"p{j}" for j, a in enumerate(a for a in result if a in given - own)}

        def axes_of(letters: Sequence[str]) -> tuple[str, ...]:
            return tuple(positions.get(a) or _together(merged.get(a, ())) for a in letters)

        call = cls(
            weight=view.name,
            input_axes=axes_of(other),
            output_axes=axes_of(result),
            sizes=tuple((f"a{k}", view.sizes[k]) for k in order),
            group_axes=groups,
            output_names=columns if inputs_first else rows,
            input_names=rows if inputs_first else columns,
            stored_inputs_first=inputs_first,
        )
        return [Recognized(call, scaled(x, factor))]

    def apply(self, params: Params, x: Tensor) -> Tensor:
        sizes = dict(self.sizes)
        weight = params[self.weight].reshape([*sizes.values()])
        flat = [" ".join(_names(axes)) for axes in (self.input_axes, [*sizes], self.output_axes)]
        known = {k: n for k, n in sizes.items() if k in _names(self.input_axes)}
        x = einops.rearrange(x, f"{' '.join(self.input_axes)} -> {flat[0]}", **known)
        out = einops.einsum(x, weight, f"{flat[0]}, {flat[1]} -> {flat[2]}")
        return einops.rearrange(out, f"{flat[2]} -> {' '.join(self.output_axes)}")

    @property
    def inputs_first(self) -> bool:
        return self.stored_inputs_first

    @property
    def groups(self) -> int:
        return self._length(self.group_axes)

    @property
    def fan_out(self) -> int:
        return self._length(self.output_names)

    def fan_in(self, x: Tensor) -> int:
        return self._length(self.input_names)

    def _length(self, names: Sequence[str]) -> int:
        sizes = dict(self.sizes)
        return math.prod([sizes[name] for name in names])

    def positions(self, x: Tensor, sharing: Sharing) -> int:
        if sharing == "reduce":
            return self.shape[0] // self.inner
        pairs = zip(self.shape, self.output_axes, strict=True)
        return math.prod([n for n, axis in pairs if axis.startswith("p")])

    def takes(self, place: Place) -> bool:
        axes = (self.input_axes, self.output_axes)
        own = {a[place.axis] for a in axes if len(a) > place.axis}
        return len(own) == 1 and own.pop().startswith("p") and len(axes[0]) > place.axis

    def by_example(self, inputs: Tensor, grads: Tensor, place: Place) -> LayerUse:
        use = super().by_example(inputs, grads, place)

        def first(axes: tuple[str, ...]) -> tuple[str, ...]:
            return (axes[place.axis], *axes[: place.axis], *axes[place.axis + 1 :])

        call = dataclasses.replace(
            use.call, input_axes=first(self.input_axes), output_axes=first(self.output_axes)
        )
        return dataclasses.replace(use, call=call)

    def cut_inputs(self, x: Tensor) -> Tensor:
        return self._cut(x, self.input_axes, self.input_names)

    def cut_grads(self, g: Tensor, x: Tensor) -> Tensor:
        return self._cut(g, ("v", *self.output_axes), self.output_names)

    def _cut(self, x: Tensor, axes: Sequence[str], names: Sequence[str]) -> Tensor:
        """Rearrange a tensor to rows, ([J,] [V,] N, T, length)."""
        sizes = dict(self.sizes)
        positions = [a for a in self.output_axes if a.startswith("p")]
        # Axis 0 counts the examples, if it can.
        count = self.output_axes[:1] == self.input_axes[:1] and positions[:1] == [
            *self.output_axes[:1]
        ]
        lead, rest = (positions[0], positions[1:]) if count else ("1", positions)
        target = [_together(self.group_axes)] if self.group_axes else []
        target += ["v"] if axes[0] == "v" else []
        target += [lead, _grouped(rest), _grouped(names)]
        known = {k: n for k, n in sizes.items() if k in _names(axes) or k in self.group_axes}
        return einops.repeat(x, f"{' '.join(axes)} -> {' '.join(target)}", **known)


def scaled(x: Tensor, factor: Any) -> Tensor:
    """An input times the factor of the weight, with which the layer is one of the parameter."""
    return x if not isinstance(factor, Tensor) and factor == 1 else x * factor


def _matrix_of(kinds: Sequence[str]) -> tuple[slice, slice, slice] | None:
    """Divide the axes of a weight into groups, rows and columns; None if that is not possible."""
    n = len(kinds)
    if kinds and kinds[-1] == "batch":
        return None
    second = next((j for j in range(n, 0, -1) if kinds[j - 1] != kinds[-1]), 0)
    other = {"in": "out", "out": "in"}.get(kinds[-1]) if kinds else None
    first = next((j for j in range(second, 0, -1) if kinds[j - 1] != other), 0)
    return slice(0, first), slice(first, second), slice(second, n)


def _together(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else _grouped(names) if names else "1"


def _grouped(names: Sequence[str]) -> str:
    return f"({' '.join(names)})"


def _names(axes: Sequence[str]) -> list[str]:
    """The names in axes such as "p0", "(a0 a1)" and "1"."""
    return [name for axis in axes for name in axis.strip("()").split() if name != "1"]


def _axes_of(equation: str, ranks: Sequence[int]) -> list[list[str]]:
    """The names of the axes of both operands and of the result of an einsum."""
    operands, arrow, result = equation.replace(" ", "").partition("->")
    parts = operands.split(",")
    if not arrow:
        letters = operands.replace(",", "").replace(".", "")
        once = sorted(a for a in {*letters} if letters.count(a) == 1)
        result = ("..." if "..." in operands else "") + "".join(once)
    rest = max(n - len(p.replace("...", "")) for p, n in zip(parts, ranks, strict=True))

    def axes(part: str, rank: int | None) -> list[str]:
        before, dots, after = part.partition("...")
        count = 0 if not dots else rest if rank is None else rank - len(before) - len(after)
        return [*before, *(f".{k}" for k in reversed(range(count))), *after]

    found = [axes(p, n) for p, n in zip(parts, ranks, strict=True)]
    return [*found, axes(result, None)]
