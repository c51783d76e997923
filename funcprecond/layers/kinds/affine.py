r"""Affine layers: ``z = W a + b`` at each position of an input.

At position t of example n, :math:`a_{nt}` is a part of the input, and :math:`g_{nt}` is the
gradient in :math:`z_{nt}`, a part of the output. The gradient of the example in ``[W | b]`` is
:math:`\sum_t g_{nt} [a_{nt}, 1]^T`. So a kind of layer only has to define the matrices with the
rows ``a`` and ``g``; Kronecker factors, second moments and per-sample gradients follow from them.
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
    """Whether the rows of the inputs are one-hot vectors, stored as indices."""
    channel: ClassVar[int] = -1
    """The axis of the output that the bias belongs to: 1, or -1 for the last."""

    @property
    def groups(self) -> int:
        """The number of groups, J: the layer is J layers, each on its share of the channels."""
        return 1

    @property
    def inputs_first(self) -> bool:
        """Whether axis 0 of the weight is the axis of the inputs; the bias is then the last row."""
        return False

    @property
    def rows_are_given(self) -> bool:
        """Whether inputs and output gradients are already rows, in the order of the weight."""
        return False

    @property
    def fan_out(self) -> int:
        """The number of entries in a row of the output gradients, in each group."""
        return self.shape[-1]

    def fan_in(self, x: Tensor) -> int:
        """The number of entries in a row of the inputs, in each group; ``x`` is an input."""
        return x.shape[-1]

    def cut_inputs(self, x: Tensor) -> Tensor:
        """Cut an input into rows, (N, T, i), or (J, N, T, i / J) for more than one group.

        If positions are merged into the axis of the examples, N counts both here.
        """
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def cut_grads(self, g: Tensor, x: Tensor) -> Tensor:
        """Cut output gradients into rows, (V, N, T, o), or (J, V, N, T, o / J).

        Args:
            g: the output gradients, (V, *output shape).
            x: the input of the layer.

        Returns:
            The rows. If positions are merged into the axis of the examples, N counts both here.
        """
        return g.reshape(g.shape[0], g.shape[1], -1, g.shape[-1])

    def input_rows(self, x: Tensor) -> Tensor:
        """Compute the rows of an input, (N, T, i), or (J, N, T, i / J) for more than one group."""
        rows = self.cut_inputs(x)
        if self.inner == 1:
            return rows
        lead, last = (0, ()) if self.one_hot else (self.groups > 1, rows.shape[-1:])
        return rows.reshape(*rows.shape[:lead], rows.shape[lead] // self.inner, -1, *last)

    def grad_rows(self, g: Tensor, x: Tensor) -> Tensor:
        """Compute the rows of output gradients.

        Args:
            g: the output gradients, (V, *output shape).
            x: the input of the layer.

        Returns:
            (V, N, T, o), or (J, V, N, T, o / J) for more than one group.
        """
        rows = self.cut_grads(g, x)
        if self.inner == 1:
            return rows
        lead = 1 + (self.groups > 1)
        count = rows.shape[lead] // self.inner
        return rows.reshape(*rows.shape[:lead], count, -1, rows.shape[-1])

    def positions(self, x: Tensor, sharing: Sharing) -> int:
        """Count the rows of an input: one per position, or with "reduce" one per example."""
        if sharing == "reduce":
            return self.shape[0] // self.inner
        return math.prod(self.shape) // self.shape[-1]

    # ------------------------------------------------------------------------ Kronecker factors
    def input_factor(
        self, uses: Sequence[LayerUse], bias: bool, sharing: Sharing, *, thin: bool = False
    ) -> Tensor:
        """Compute the mean of ``[a, 1] [a, 1]^T`` over all rows of the inputs.

        Args:
            uses: all uses of the layer.
            bias: whether the 1 is appended.
            sharing: with "expand", every position is a row; with "reduce", the mean over the
                positions of an example is a row.
            thin: whether to return, instead of the factor, M rows whose Gram matrix it is, if there
                is only one use and M is less than the number of columns.

        Returns:
            (i, i), or (J, i / J, i / J) for more than one group, with i + 1 in place of i if there
            is a bias. If ``thin`` applies, (..., M, i).
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
        """Compute the sum of ``[a, 1] [a, 1]^T`` over the rows of one use.

        With ``thin``, the result is the rows themselves if they are fewer than their columns.
        """
        rows = self.input_rows(use.inputs).to(dtype)
        rows = rows.mean(-2) if sharing == "reduce" else rows.flatten(-3, -2)
        if rows.shape[-2] < rows.shape[-1]:
            rows = with_ones(rows) if bias else rows
            return rows if thin else gram(rows)
        return gram(rows, rows.shape[-2] if bias else None)

    def input_diagonal(self, uses: Sequence[LayerUse], bias: bool, sharing: Sharing) -> Tensor:
        """Compute the diagonal of :meth:`input_factor`, (i,), or (i + 1,) with a bias."""
        rows = [use.call.input_rows(use.inputs).to(factor_dtype(use.grads)) for use in uses]
        rows = [x.mean(-2, keepdim=True) if sharing == "reduce" else x for x in rows]
        mean = torch.cat([x.reshape(-1, x.shape[-1]) for x in rows]).square().mean(0)
        return torch.cat([mean, torch.ones_like(mean[:1])]) if bias else mean

    def output_factor(
        self, uses: Sequence[LayerUse], sharing: Sharing, scale: Tensor, *, thin: bool = False
    ) -> Tensor:
        """Compute ``scale Σ g g^T`` over all rows of the output gradients.

        Args:
            uses: all uses of the layer.
            sharing: with "expand", every position is a row; with "reduce", the sum over the
                positions of an example is a row.
            scale: a 0-d tensor.
            thin: see :meth:`input_factor`.

        Returns:
            (o, o), or (J, o / J, o / J) for more than one group. If ``thin`` applies, (..., M, o).
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
        """Compute (..., M, o), the rows whose Gram matrix is :meth:`output_factor` / scale."""
        g = self.grad_rows(use.grads, use.inputs)
        g = g.sum(-2, keepdim=True) if sharing == "reduce" else g
        return g.to(factor_dtype(g)).flatten(-4, -2)

    def output_moment(self, use: LayerUse, sharing: Sharing) -> Tensor | None:
        """Compute the Gram matrix of :meth:`output_rows`, if a kind can do so without the rows.

        Returns:
            The Gram matrix, or None.
        """
        return None

    def output_diagonal(self, uses: Sequence[LayerUse], sharing: Sharing, scale: Tensor) -> Tensor:
        """Compute the diagonal of :meth:`output_factor`, (o,)."""
        rows = [use.call.output_rows(use, sharing) for use in uses]
        parts = [g.reshape(-1, g.shape[-1]).square().sum(0) for g in rows]
        return functools.reduce(torch.add, parts) * scale

    # ------------------------------------------------------------------------------- means
    def input_mean(self, uses: Sequence[LayerUse], bias: bool) -> Tensor:
        """Compute the mean of ``[a, 1]`` over all rows of the inputs.

        Args:
            uses: all uses of the layer.
            bias: whether the 1 is appended.

        Returns:
            (i,), or (J, i / J) for more than one group, with i + 1 in place of i if there is a
            bias.
        """
        dtype = factor_dtype(uses[0].grads)
        total = functools.reduce(torch.add, [use.call.input_sum(use, dtype) for use in uses])
        mean = total / sum(use.call.positions(use.inputs, "expand") for use in uses)
        return with_ones(mean) if bias else mean

    def input_sum(self, use: LayerUse, dtype: torch.dtype) -> Tensor:
        """Compute the sum of the rows of the inputs of one use, (i,), or (J, i / J)."""
        return self.input_rows(use.inputs).to(dtype).sum((-3, -2))

    def output_sum(self, uses: Sequence[LayerUse]) -> Tensor:
        """Compute the sum of the rows of the output gradients, (o,), or (J, o / J)."""
        rows = [use.call.grad_rows(use.grads, use.inputs) for use in uses]
        parts = [g.to(factor_dtype(g)).sum((-4, -3, -2)) for g in rows]
        return functools.reduce(torch.add, parts)

    # ----------------------------------------------------------------------- single examples
    def second_moments(
        self,
        uses: Sequence[LayerUse],
        bias: bool,
        left: Tensor | None = None,
        right: Tensor | None = None,
    ) -> Tensor:
        """Compute ``Σ (left^T G_n right)²``, summed over cotangents and examples.

        Args:
            uses: all uses of the layer.
            bias: whether the bias is the last column of ``G_n``, or the last row if
                :attr:`inputs_first`.
            left: an orthonormal basis for axis 0 of the weight as columns, (o, o), or
                (J, o / J, o / J) for more than one group; None is the identity.
            right: the same for the other axes of the weight.

        Returns:
            (o, i + 1), or (J, o / J, i + 1) for more than one group; (i + 1, o) if
            :attr:`inputs_first`. Without a bias, i + 1 is i.
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
    """Append a column of ones, the input that belongs to a bias."""
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
