"""The per-example gradients of one affine layer, as pairs of inputs and output gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from funcprecond.curvature.layer_statistics import LayerUse
from funcprecond.linalg.precision import factor_dtype
from funcprecond.problems import Params
from funcprecond.tree import state, static

__all__ = ["Pairs", "pairs_of"]


@state
class Pairs:
    """The rows of one affine layer, as pairs: row (v, n) is ``sum_t g_vnt a_nt^T`` in each group.

    Attributes:
        inputs: (J, N, T, i), a last 1 for the bias included; an embedding's ids, (1, N, T).
        grads: (J, V, N, T, o), zero at an embedding's padding.
        weight, bias: which parameters; the bias may be None.
        shape: the weight's.
        transposed: whether the weight is stored (J i, o).
    """

    inputs: Tensor
    grads: Tensor
    weight: str = static()
    bias: str | None = static()
    shape: tuple[int, ...] = static()
    transposed: bool = static()

    @property
    def ids(self) -> bool:
        """Whether the inputs are one-hot vectors, by their indices."""
        return self.inputs.ndim == 3

    def gram(self, other: "Pairs | None" = None) -> Tensor:
        """(V N, W M), the inner products with the rows of ``other``, or with its own.

        By whichever of the two ways takes fewer operations.
        """
        right = self if other is None else other
        (_, v, n, t, o), (_, w, m, s, _) = self.grads.shape, right.grads.shape
        i = self.shape[0] if self.ids else self.inputs.shape[-1]
        pairwise = n * t * m * s * (1 if self.ids else i) + v * n * t * w * m * s * o
        forming = v * n * t + (0 if other is None else w * m * s)
        by_rows = forming * i * o + v * n * w * m * i * o
        if max(t, s) > 1 and by_rows < pairwise:
            rows = self.matrices().flatten(2).flatten(0, 1)
            others = rows if other is None else other.matrices().flatten(2).flatten(0, 1)
            return rows @ others.mT
        if self.ids:
            flat, others = self.inputs.flatten(1), right.inputs.flatten(1)
            a = (flat.unsqueeze(2) == others.unsqueeze(1)).to(self.grads.dtype)
        else:
            a = self.inputs.flatten(1, 2) @ right.inputs.flatten(1, 2).mT
        g = self.grads.flatten(1, 3) @ right.grads.flatten(1, 3).mT
        products = g.reshape(-1, v, n * t, w, m * s) * a.reshape(-1, 1, n * t, 1, m * s)
        return products.reshape(-1, v * n, t, w * m, s).sum((0, 2, 4))

    def matrices(self) -> Tensor:
        """(V, N, J, o, i): the rows, formed."""
        if not self.ids:
            return torch.einsum("jvnto,jnti->vnjoi", self.grads, self.inputs)
        (v, n, _, o), tokens = self.grads.shape[1:], self.shape[0]
        rows = self.inputs[0] + tokens * torch.arange(n, device=self.inputs.device).unsqueeze(1)
        flat = self.grads.new_zeros(v, n * tokens, o)
        flat = flat.index_add(1, rows.flatten(), self.grads[0].flatten(1, 2))
        return flat.reshape(v, n, 1, tokens, o).mT

    def matvec(self, vector: Params) -> Tensor:
        """(V, N): the rows times a vector."""
        if self.ids:
            mapped = vector[self.weight].to(self.grads.dtype)[self.inputs]
        else:
            mapped = torch.einsum("joi,jnti->jnto", self._join(vector), self.inputs)
        return (self.grads * mapped.unsqueeze(1)).sum((0, 3, 4))

    def rmatvec(self, weights: Tensor) -> Params:
        """``sum weights_vn row_vn`` for weights (V, N)."""
        g = torch.einsum("jvnto,vn->jnto", self.grads, weights)
        if self.ids:
            flat = g.new_zeros(self.shape)
            return {self.weight: flat.index_add(0, self.inputs.flatten(), g.flatten(0, 2))}
        return self._split(torch.einsum("jnto,jnti->joi", g, self.inputs))

    def diagonal(self) -> Params:
        """The sum of the rows' squares."""
        if not self.ids and self.inputs.shape[2] == 1:
            return self._split(
                torch.einsum("jvnto,jnti->joi", self.grads.square(), self.inputs.square())
            )
        return self._split(self.matrices().square().sum((0, 1)))

    def rows(self) -> Params:
        """(V N, *shape) for each parameter."""
        return torch.vmap(self._split)(self.matrices().flatten(0, 1))

    def _join(self, vector: Params) -> Tensor:
        """(J, o, i) from the weight and the bias."""
        w = vector[self.weight].to(self.grads.dtype)
        groups = self.inputs.shape[0]
        matrix = w.flatten(1).unflatten(0, (groups, -1))
        matrix = matrix.mT if self.transposed else matrix
        if self.bias is None:
            return matrix
        column = vector[self.bias].to(matrix.dtype).reshape(groups, -1, 1)
        return torch.cat([matrix, column], -1)

    def _split(self, matrix: Tensor) -> Params:
        """The inverse of :meth:`_join`."""
        found = {}
        if self.ids:
            return {self.weight: matrix.reshape(matrix.shape[-2:]).mT}
        if self.bias is not None:
            matrix, column = matrix[..., :-1], matrix[..., -1]
            found[self.bias] = column.reshape(-1)
        found[self.weight] = (matrix.mT if self.transposed else matrix).reshape(self.shape)
        return found


def pairs_of(uses: Sequence[LayerUse], param: Tensor, weight: str, bias: str | None) -> Pairs:
    """A weight used several times has the positions of all uses."""
    call, dtype = uses[0].call, factor_dtype(param)
    inputs = [u.input_rows() for u in uses]
    grads = [u.grad_rows().to(dtype) for u in uses]
    if not call.kind.startswith("conv"):
        inputs, grads = [x.unsqueeze(0) for x in inputs], [g.unsqueeze(0) for g in grads]
    if call.kind == "embedding":
        padding = call.options[0]
        if padding is not None:
            kept = [x != padding % param.shape[0] for x in inputs]
            grads = [g * k[:, None, ..., None] for g, k in zip(grads, kept, strict=True)]
    else:
        inputs = [x.to(dtype) for x in inputs]
        if bias is not None:
            inputs = [torch.cat([x, torch.ones_like(x[..., :1])], -1) for x in inputs]
    return Pairs(
        torch.cat(inputs, 2),
        torch.cat(grads, 3),
        weight,
        bias,
        tuple(param.shape),
        call.kind == "conv_transpose" or call.options == ("in_out",),
    )
