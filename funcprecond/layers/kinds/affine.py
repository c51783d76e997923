r"""Affine layers: ``z = W a + b`` at each position, with ``a`` and ``z`` cut out of input and output.

The gradient of example n in ``[W | b]`` is :math:`\sum_t g_{nt} [a_{nt}, 1]^T`. So the rows ``a`` of
the inputs and ``g`` of the output gradients are all that a kind must give; factors, second moments
and the gradients of single examples follow from them.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.layers.example_gradients import ExampleGradients
from funcprecond.layers.layer_call import LayerCall, LayerUse, Sharing
from funcprecond.layers.second_moments import second_moments
from funcprecond.linalg.gram import gram
from funcprecond.linalg.precision import factor_dtype
from funcprecond.tree import Params

__all__ = ["AffineCall", "with_ones"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AffineCall(LayerCall):
    """A use of an affine layer."""

    one_hot: ClassVar[bool] = False
    """Whether the rows of the inputs are one-hot vectors, given by their indices."""

    @property
    def groups(self) -> int:
        """J: the layer is J layers side by side, each on its share of the channels."""
        return 1

    @property
    def inputs_first(self) -> bool:
        """Whether axis 0 of the weight is the inputs', so that the bias is a last row of it."""
        return False

    @property
    def rows_are_given(self) -> bool:
        """Whether inputs and output gradients are the rows as they came, in the weight's order."""
        return False

    @property
    def fan_out(self) -> int:
        """How many columns the output gradients' rows have, in each group."""
        return self.shape[-1]

    def fan_in(self, x: Tensor) -> int:
        """How many columns the inputs' rows have, in each group; ``x`` is an input."""
        return x.shape[-1]

    def input_rows(self, x: Tensor) -> Tensor:
        """(N, T, i) rows of an input; (J, N, T, i / J) for more than one group."""
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def grad_rows(self, g: Tensor, x: Tensor) -> Tensor:
        """(V, N, T, o) rows of output gradients; (J, V, N, T, o / J) for more than one group."""
        return g.reshape(g.shape[0], g.shape[1], -1, g.shape[-1])

    def positions(self, x: Tensor, sharing: Sharing) -> int:
        """How many rows the input has: one for each position, or with "reduce" for each example."""
        return self.shape[0] if sharing == "reduce" else math.prod(self.shape) // self.shape[-1]

    # ------------------------------------------------------------------------ Kronecker factors
    def input_factor(
        self, uses: Sequence[LayerUse], bias: bool, sharing: Sharing, *, thin: bool = False
    ) -> Tensor:
        """The mean of ``[a, 1] [a, 1]^T`` over all rows of the inputs.

        Args:
            uses: all uses of the layer.
            bias: whether a 1 is appended.
            sharing: "expand" takes every position as a row of its own, "reduce" the mean over an
                example's positions.
            thin: return (..., M, i) rows whose Gram matrix it is, where these are fewer than their
                columns and come from a single use.

        Returns:
            (i, i), or (J, i / J, i / J) for more than one group; i + 1 with a bias.
        """
        dtype = factor_dtype(uses[0].grads)
        total, count = None, 0
        for use in uses:
            positions = use.call.positions(use.inputs, sharing)
            moment = use.call.input_moment(use, bias, sharing, dtype, thin and len(uses) == 1)
            if moment.shape[-2] < moment.shape[-1]:
                return moment * positions**-0.5
            total = moment if total is None else total + moment
            count += positions
        return total / count  # pyright: ignore[reportOptionalOperand]

    def input_moment(
        self, use: LayerUse, bias: bool, sharing: Sharing, dtype: torch.dtype, thin: bool
    ) -> Tensor:
        """The sum over the rows of one use, or, with ``thin``, the rows if they are few."""
        rows = self.input_rows(use.inputs).to(dtype)
        rows = rows.mean(-2) if sharing == "reduce" else rows.flatten(-3, -2)
        if rows.shape[-2] < rows.shape[-1]:
            rows = with_ones(rows) if bias else rows
            return rows if thin else gram(rows)
        return gram(rows, rows.shape[-2] if bias else None)

    def input_diagonal(self, uses: Sequence[LayerUse], bias: bool, sharing: Sharing) -> Tensor:
        """(i,), or (i + 1,) with a bias: the diagonal of :meth:`input_factor` alone."""
        rows = [use.call.input_rows(use.inputs).to(factor_dtype(use.grads)) for use in uses]
        rows = [x.mean(-2, keepdim=True) if sharing == "reduce" else x for x in rows]
        mean = torch.cat([x.reshape(-1, x.shape[-1]) for x in rows]).square().mean(0)
        return torch.cat([mean, torch.ones_like(mean[:1])]) if bias else mean

    def output_factor(
        self, uses: Sequence[LayerUse], sharing: Sharing, scale: Tensor, *, thin: bool = False
    ) -> Tensor:
        """``scale Σ g g^T`` over all rows of the output gradients.

        With "reduce" an example's rows are summed over its positions first.

        Args:
            uses: all uses of the layer.
            sharing: see :meth:`input_factor`.
            scale: a 0-d tensor.
            thin: see :meth:`input_factor`.

        Returns:
            (o, o), or (J, o / J, o / J) for more than one group.
        """
        parts = []
        for use in uses:
            moment = use.call.output_moment(use, sharing)
            if moment is not None:
                parts.append(moment * scale)
                continue
            rows = use.call.output_rows(use, sharing)
            if rows.shape[-2] < rows.shape[-1]:
                rows = rows * scale.to(rows.dtype).sqrt()
                parts.append(rows if thin and len(uses) == 1 else gram(rows))
            else:
                parts.append(gram(rows) * scale)
        return functools.reduce(torch.add, parts)

    def output_rows(self, use: LayerUse, sharing: Sharing) -> Tensor:
        """(..., M, o): the rows that :meth:`output_factor` is the Gram matrix of, without scale."""
        g = self.grad_rows(use.grads, use.inputs)
        g = g.sum(-2, keepdim=True) if sharing == "reduce" else g
        return g.to(factor_dtype(g)).flatten(-4, -2)

    def output_moment(self, use: LayerUse, sharing: Sharing) -> Tensor | None:
        """Their Gram matrix, where a kind has a way to it that costs less than the rows; or None."""
        return None

    def output_diagonal(self, uses: Sequence[LayerUse], sharing: Sharing, scale: Tensor) -> Tensor:
        """(o,): the diagonal of :meth:`output_factor` alone."""
        rows = [use.call.output_rows(use, sharing) for use in uses]
        parts = [g.reshape(-1, g.shape[-1]).square().sum(0) for g in rows]
        return functools.reduce(torch.add, parts) * scale

    # ----------------------------------------------------------------------- single examples
    def second_moments(
        self,
        uses: Sequence[LayerUse],
        bias: bool,
        left: Tensor | None = None,
        right: Tensor | None = None,
    ) -> Tensor:
        """``Σ (left^T G_n right)²`` entry by entry, over cotangents and examples.

        Args:
            uses: all uses of the layer.
            bias: whether the bias is a last column of ``G_n``, or row if the inputs are first.
            left: eigenvectors of the weight's axis 0 as columns, (o, o), or (J, o / J, o / J);
                None is the identity.
            right: likewise of the remaining axes.

        Returns:
            (o, i + 1), or (J, o / J, i + 1); (i + 1, o) if the inputs are first.
        """
        of_outputs, of_inputs = (right, left) if self.inputs_first else (left, right)
        moments = second_moments(uses, bias, of_outputs, of_inputs)
        return moments.mT if self.inputs_first else moments

    def example_gradients(
        self, uses: Sequence[LayerUse], params: Params
    ) -> ExampleGradients | dict[str, Tensor]:
        bias = self.bias if self.bias in params else None
        if self.weight in params:
            shape = tuple(params[self.weight].shape)
            return ExampleGradients.of(uses, self.weight, bias, shape)
        if bias is None:
            return {}
        terms = []
        for use in uses:
            g = use.call.grad_rows(use.grads, use.inputs)
            g = g.to(factor_dtype(g)).sum(-2)
            terms.append(g if self.groups == 1 else g.movedim(0, 2).flatten(2))
        return {bias: functools.reduce(torch.add, terms).flatten(0, 1)}

    def diagonal(self, uses: Sequence[LayerUse], params: Params) -> Params:
        bias = self.bias if self.bias in params else None
        moments = self.second_moments(uses, bias is not None)
        found = {}
        if bias is not None:
            axis = -2 if self.inputs_first else -1
            size = moments.shape[axis]
            found[bias] = moments.select(axis, size - 1).reshape(params[bias].shape)
            moments = moments.narrow(axis, 0, size - 1)
        found[self.weight] = moments.reshape(params[self.weight].shape)
        return found


def with_ones(rows: Tensor) -> Tensor:
    """The rows with a 1 appended, which is the input that belongs to a bias."""
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
