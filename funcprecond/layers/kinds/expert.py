"""Experts: linear layers whose weights are stacked in one parameter, of which a token uses one."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.kinds.contraction import scaled
from funcprecond.layers.layer_call import (
    FunctionCall,
    LayerCall,
    LayerUse,
    Names,
    Recognized,
    Sharing,
)
from funcprecond.layers.place import Place
from funcprecond.layers.views import View
from funcprecond.linalg.gram import gram
from funcprecond.linalg.precision import factor_dtype
from funcprecond.tree import Params

__all__ = ["Expert"]

GROUPED_PRODUCTS = tuple(
    getattr(place, name)
    for place, name in ((F, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(place, name)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expert(AffineCall):
    """A use of the weight of one expert, an entry of an (E, o, i) or (E, i, o) parameter.

    The rows of an expert belong to the tokens that were routed to it. Which example a token is from
    is not known here.

    Attributes:
        index: the index of the expert.
        experts: the number of experts, E.
        stored_inputs_first: whether the weights are stored as (i, o).
        start, stop: the positions of the expert's tokens on axis 0 of the input.
    """

    index: int
    experts: int
    stored_inputs_first: bool
    start: int = 0
    stop: int | None = None

    functions = GROUPED_PRODUCTS

    @classmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        x, weight = call.argument(0, "mat_a", call.kwargs.get("self")), call.argument(1, "mat_b")
        weight = call.kwargs.get("mat2", weight)
        view, ends = names.view(weight), call.argument(2, "offs")
        if view is None or names.view(x) or not view.is_whole or len(view.axes) != 3:
            return []
        if x.ndim != 2 or ends is None or view.axes[0] != (0,) or not view.is_linear:
            return []
        if view.is_in_order():
            inputs_first = True
        elif view.is_in_order([0, 2, 1]):
            inputs_first = False
        else:
            return []
        stops = ends.tolist()
        uses = []
        for e, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            expert = cls(
                weight=view.name,
                index=e,
                experts=len(stops),
                stored_inputs_first=inputs_first,
                start=start,
                stop=stop,
            )
            uses += [Recognized(expert, x)] if stop > start else []
        return uses

    @classmethod
    def of(cls, view: View, x: Tensor, scale: Any, inputs_first: bool) -> Recognized | None:
        """The use of one expert's weight in ``x W^T`` or, with the inputs first, in ``x W``."""
        is_transposed = view.is_transposed()
        if is_transposed is None:
            return None
        call = cls(
            weight=view.name,
            index=view.index or 0,
            experts=view.sizes[0],
            stored_inputs_first=inputs_first != is_transposed,
        )
        return Recognized(call, scaled(x, view.factor * scale))

    def apply(self, params: Params, x: Tensor) -> Tensor:
        matrix = params[self.weight][self.index].reshape(
            (-1, self.shape[-1]) if self.stored_inputs_first else (self.shape[-1], -1)
        )
        own = F.linear(x[self.start : self.stop], matrix.mT if self.stored_inputs_first else matrix)
        after = 0 if self.stop is None else self.shape[0] - self.stop
        return F.pad(own, (*[0, 0] * (own.ndim - 1), self.start, after))

    def combines_with(self, other: LayerCall) -> bool:
        if isinstance(other, Expert):
            where = {k: getattr(self, k) for k in ("index", "start", "stop")}
            other = dataclasses.replace(other, **where)
        return super().combines_with(other)

    def takes(self, place: Place) -> bool:
        return False

    @property
    def groups(self) -> int:
        return self.experts

    @property
    def inputs_first(self) -> bool:
        return self.stored_inputs_first

    def input_factor(
        self, uses: Sequence[LayerUse], bias: bool, sharing: Sharing, *, thin: bool = False
    ) -> Tensor:
        """Compute (E, i, i), the mean of ``a a^T`` over the tokens of each expert."""
        moments, counts = _totals(uses, [use.inputs for use in uses])
        return moments / counts.clamp_min(1).reshape(-1, 1, 1)

    def output_factor(
        self, uses: Sequence[LayerUse], sharing: Sharing, scale: Tensor, *, thin: bool = False
    ) -> Tensor:
        """Compute (E, o, o), ``scale Σ g g^T`` over the tokens of each expert."""
        parts = [_totals(uses, [use.grads[v] for use in uses])[0] for v in range(_cotangents(uses))]
        return functools.reduce(torch.add, parts) * scale


def _cotangents(uses: Sequence[LayerUse]) -> int:
    return uses[0].grads.shape[0]


def _totals(uses: Sequence[LayerUse], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of the outer products of the rows of each expert, (E, n, n), and their number."""
    dtype = factor_dtype(uses[0].grads)
    experts, width = uses[0].call.experts, tensors[0].shape[-1]
    counts = [0] * experts
    moments: list[Any] = [None] * experts
    for use, x in zip(uses, tensors, strict=True):
        call: Expert = use.call
        rows = x[call.start : call.stop].reshape(-1, width).to(dtype)
        counts[call.index] += rows.shape[0]
        moment, before = gram(rows), moments[call.index]
        moments[call.index] = moment if before is None else before + moment
    zero = tensors[0].new_zeros(width, width, dtype=dtype)
    found = torch.stack([zero if x is None else x for x in moments])
    return found, torch.tensor(counts, dtype=dtype, device=found.device)
