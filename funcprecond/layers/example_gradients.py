"""Per-sample gradients of one affine layer, kept as inputs and output gradients.

The gradient of example n is ``Σ_t g_nt a_nt^T``, a sum over its positions t. Norms, inner products
and products with vectors follow from the factors g and a, without forming the gradient.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from funcprecond.layers.layer_call import LayerUse
from funcprecond.linalg.precision import factor_dtype
from funcprecond.tree import Params, state, static

__all__ = ["ExampleGradients"]


@state
class ExampleGradients:
    """The rows of one affine layer: row (v, n) is ``Σ_t g_vnt a_nt^T`` in each of the J groups.

    The indices are the cotangent v, the example n and the position t. The columns i of a and o of g
    are the inputs and the outputs of a group.

    Attributes:
        inputs: a, (J, N, T, i), with a last column of ones if there is a bias; for an embedding the
            indices, (1, N, T).
        grads: g, (J, V, N, T, o); zero at the padding of an embedding.
        weight, bias: the names of the parameters; the bias may be None.
        shape: the shape of the weight.
        inputs_first: whether axis 0 of the weight is the axis of the inputs.
    """

    inputs: Tensor
    grads: Tensor
    weight: str = static()
    bias: str | None = static()
    shape: tuple[int, ...] = static()
    inputs_first: bool = static()

    @classmethod
    def of(
        cls, uses: Sequence[LayerUse], weight: str, bias: str | None, shape: tuple[int, ...]
    ) -> "ExampleGradients":
        """Make the rows of a layer from all of its uses.

        Args:
            uses: all uses of the layer. Each use of a shared weight adds positions.
            weight, bias: the names of its parameters.
            shape: the shape of the weight.

        Returns:
            The rows.
        """
        call = uses[0].call
        inputs = [use.call.input_rows(use.inputs) for use in uses]
        grads = [use.call.grad_rows(use.grads, use.inputs) for use in uses]
        dtype = factor_dtype(grads[0])
        grads = [g.to(dtype) for g in grads]
        if not call.one_hot:
            inputs = [x.to(dtype) for x in inputs]
        if call.groups == 1:
            inputs, grads = [x.unsqueeze(0) for x in inputs], [g.unsqueeze(0) for g in grads]
        if bias is not None:
            inputs = [torch.cat([x, torch.ones_like(x[..., :1])], -1) for x in inputs]
        return cls(
            torch.cat(inputs, 2), torch.cat(grads, 3), weight, bias, shape, call.inputs_first
        )

    @property
    def one_hot(self) -> bool:
        """Whether the inputs are one-hot vectors, stored as indices."""
        return self.inputs.ndim == 3

    def gram(self, other: "ExampleGradients | None" = None) -> Tensor:
        """Compute the inner products of the rows with those of another batch, or with themselves.

        They are computed from the factors or from the formed rows, whichever takes fewer
        operations.

        Args:
            other: the rows of the same layer for W cotangents and M examples; by default, these
                rows themselves.

        Returns:
            (V N, W M).
        """
        right = self if other is None else other
        (_, v, n, t, o), (_, w, m, s, _) = self.grads.shape, right.grads.shape
        i = math.prod(self.shape[:-1]) if self.one_hot else self.inputs.shape[-1]
        pairwise = n * t * m * s * (1 if self.one_hot else i) + v * n * t * w * m * s * o
        forming = v * n * t + (0 if other is None else w * m * s)
        by_rows = forming * i * o + v * n * w * m * i * o
        if max(t, s) > 1 and by_rows < pairwise:
            rows = self.matrices().flatten(2).flatten(0, 1)
            others = rows if other is None else other.matrices().flatten(2).flatten(0, 1)
            return rows @ others.mT
        if self.one_hot:
            flat, others = self.inputs.flatten(1), right.inputs.flatten(1)
            a = (flat.unsqueeze(2) == others.unsqueeze(1)).to(self.grads.dtype)
        else:
            a = self.inputs.flatten(1, 2) @ right.inputs.flatten(1, 2).mT
        g = self.grads.flatten(1, 3) @ right.grads.flatten(1, 3).mT
        products = g.reshape(-1, v, n * t, w, m * s) * a.reshape(-1, 1, n * t, 1, m * s)
        return products.reshape(-1, v * n, t, w * m, s).sum((0, 2, 4))

    def squared_norms(self) -> Tensor:
        """Compute (N,), the squared norms of the rows of the first cotangent."""
        g, a = self.grads[:, 0], self.inputs
        if self.one_hot:
            same = (a.unsqueeze(-1) == a.unsqueeze(-2)).to(g.dtype)
            return (same * (g @ g.mT)).sum((0, 2, 3))
        t, o, i = g.shape[2], g.shape[3], a.shape[3]
        if t == 1:
            return (a.square().sum(-1) * g.square().sum(-1)).sum((0, 2))
        if t * (o + i) < o * i:
            return ((a @ a.mT) * (g @ g.mT)).sum((0, 2, 3))
        return (g.mT @ a).square().sum((0, 2, 3))

    def matrices(self) -> Tensor:
        """Form the rows as matrices, (V, N, J, o, i)."""
        if not self.one_hot:
            return torch.einsum("jvnto,jnti->vnjoi", self.grads, self.inputs)
        (v, n, _, o), tokens = self.grads.shape[1:], math.prod(self.shape[:-1])
        rows = self.inputs[0] + tokens * torch.arange(n, device=self.inputs.device).unsqueeze(1)
        flat = self.grads.new_zeros(v, n * tokens, o)
        flat = flat.index_add(1, rows.flatten(), self.grads[0].flatten(1, 2))
        return flat.reshape(v, n, 1, tokens, o).mT

    def matvec(self, vector: Params) -> Tensor:
        """Multiply the rows by a vector shaped like the parameters; returns (V, N)."""
        if self.one_hot:
            table = vector[self.weight].to(self.grads.dtype)
            mapped = table.reshape(-1, table.shape[-1])[self.inputs]
        else:
            mapped = torch.einsum("joi,jnti->jnto", self._join(vector), self.inputs)
        return (self.grads * mapped.unsqueeze(1)).sum((0, 3, 4))

    def rmatvec(self, weights: Tensor) -> Params:
        """Compute ``Σ_vn weights_vn row_vn`` for weights (V, N), shaped like the parameters."""
        g = torch.einsum("jvnto,vn->jnto", self.grads, weights)
        if self.one_hot:
            flat = g.new_zeros(math.prod(self.shape[:-1]), self.shape[-1])
            flat = flat.index_add(0, self.inputs.flatten(), g.flatten(0, 2))
            return {self.weight: flat.reshape(self.shape)}
        return self._split(torch.einsum("jnto,jnti->joi", g, self.inputs))

    def diagonal(self) -> Params:
        """Compute the sum of the squared rows, entry by entry, shaped like the parameters."""
        if not self.one_hot and self.inputs.shape[2] == 1:
            return self._split(
                torch.einsum("jvnto,jnti->joi", self.grads.square(), self.inputs.square())
            )
        return self._split(self.matrices().square().sum((0, 1)))

    def rows(self) -> Params:
        """Form the rows, (V N, *shape) for each parameter."""
        return torch.vmap(self._split)(self.matrices().flatten(0, 1))

    def _join(self, vector: Params) -> Tensor:
        """Join the weight and the bias to (J, o, i)."""
        w = vector[self.weight].to(self.grads.dtype)
        groups = self.inputs.shape[0]
        inputs = self.inputs.shape[-1] - (self.bias is not None)
        rows = inputs if self.inputs_first else self.grads.shape[-1]
        matrix = w.reshape(groups, rows, -1)
        matrix = matrix.mT if self.inputs_first else matrix
        if self.bias is None:
            return matrix
        column = vector[self.bias].to(matrix.dtype).reshape(groups, -1, 1)
        return torch.cat([matrix, column], -1)

    def _split(self, matrix: Tensor) -> Params:
        """The inverse of :meth:`_join`."""
        found = {}
        if self.one_hot:
            return {self.weight: matrix.reshape(matrix.shape[-2:]).mT.reshape(self.shape)}
        if self.bias is not None:
            matrix, column = matrix[..., :-1], matrix[..., -1]
            found[self.bias] = column.reshape(-1)
        found[self.weight] = (matrix.mT if self.inputs_first else matrix).reshape(self.shape)
        return found
