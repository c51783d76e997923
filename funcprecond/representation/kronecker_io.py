r"""Layer-wise Kronecker factors: output gradients ⊗ inputs.

A layer's block of the Fisher matrix is approximated by ``left ⊗ right``, one factor for each axis
of
its weight: for a linear layer ``[W | b]`` of shape (o, i + 1) these are the second moments of the
output gradients, ``left = scale Σ g g^T``, and of the inputs, ``right = mean [a, 1] [a, 1]^T``.
Only the product has meaning; it has the scale of the loss.
"""

import functools

import torch
from einops import rearrange
from torch import Tensor

from funcprecond.curvature.layers import Layers, LayerUse, Sharing, split_block
from funcprecond.problem import Params
from funcprecond.representation import average
from funcprecond.representation.diagonal import factor_dtype, zero_weight
from funcprecond.tree import state, static

__all__ = ["KroneckerIO", "layer_rows"]


@state
class KroneckerIO:
    """Kronecker factors of every layer, and what stands in where there is no such layer.

    Empty until the first measurement, since layers are found by running the model. All but
    ``weight``
    are totals: divided by it they are the averages.

    Attributes:
        left: for each block ``"weight+bias"`` (or ``"weight"``) the factor of the weight's axis 0:
            (o, o); (J, o / J, o / J) for a convolution of J groups; (V,), a diagonal, for an
            embedding.
        right: the factor of the remaining axes, with the bias as last row and column: (i + 1, i +
            1) likewise.
        units: for a norm layer of U units the exact (U, 2, 2) blocks of scale and bias, (U, 1, 1)
            without bias.
        others: the diagonal for parameters that no layer covers.
        weight: 0-d, see :mod:`funcprecond.representation.average`.
        names: the parameters this state belongs to.
        rows: of a local measurement (``decay=None``), keep a factor of n rows and columns as the
            (r, n) rows that it is the product of, if these are fewer.
    """

    left: dict[str, Tensor]
    right: dict[str, Tensor]
    units: dict[str, Tensor]
    others: dict[str, Tensor]
    weight: Tensor
    names: tuple[str, ...] = static()
    rows: bool = static(default=False)

    @classmethod
    def init(cls, params: Params, rows: bool = False) -> "KroneckerIO":
        """Empty."""
        return cls({}, {}, {}, {}, zero_weight(params), tuple(params), rows)

    def accumulate(self, value: Layers, decay: average.Decay) -> "KroneckerIO":
        """Take in a measurement of the layers."""
        value = value.restrict(self.names)
        left, right, units = {}, {}, {}
        for block, uses in value.uses.items():
            bias = split_block(block)[1] is not None
            if uses[0].call.kind == "norm":
                units[block] = _unit_blocks(uses, bias, value.scale)
            else:
                left[block], right[block] = _factors(
                    uses, bias, value.sharing, value.scale, self.rows and decay is None
                )
        others = {k: d * value.scale for k, d in value.others.items()}

        def merge(old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: average.accumulate(old.get(k), x, decay) for k, x in new.items()}

        return KroneckerIO(
            merge(self.left, left),
            merge(self.right, right),
            merge(self.units, units),
            merge(self.others, others),
            average.weight(self.weight, decay),
            self.names,
            self.rows,
        )

    def block(self, name: str) -> Tensor:
        """A layer's block as a dense matrix, in the order of the flattened ``[W | b]``."""
        left, right = (product(x) / self.weight for x in (self.left[name], self.right[name]))
        if left.ndim == 1:
            return torch.kron(left.diag(), right.contiguous())
        if left.ndim == 2:
            return torch.kron(left.contiguous(), right.contiguous())
        return torch.block_diag(
            *(torch.kron(x.contiguous(), y.contiguous()) for x, y in zip(left, right, strict=True))
        )


def product(factor: Tensor) -> Tensor:
    """A factor as a square matrix, of its rows if it is kept as them; a diagonal as it is."""
    if factor.ndim == 1 or factor.shape[-1] == factor.shape[-2]:
        return factor
    return factor.mT @ factor


def layer_rows(use: LayerUse, bias: bool, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """The rows whose second moments are a layer's factors, in float32 or wider.

    With "expand" every position of an example is a row of its own: exact for losses with a term a
    position. With "reduce" inputs are averaged and output gradients summed over the positions:
    exact where the outputs are pooled over them (Eschenhagen et al., arXiv 2311.00636).

    Returns:
        (..., M, i) inputs, with ones appended if there is a bias, and (..., V M, o) output
        gradients; the leading axis is a convolution's groups.
    """
    a, g = use.input_rows(), use.grad_rows()
    if sharing == "reduce":
        a, g = a.mean(-2, keepdim=True), g.sum(-2, keepdim=True)
    dtype = factor_dtype(g)
    a = rearrange(a.to(dtype), "... n t i -> ... (n t) i")
    g = rearrange(g.to(dtype), "... v n t o -> ... (v n t) o")
    if bias:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    return a, g


def _factors(
    uses: tuple[LayerUse, ...], bias: bool, sharing: Sharing, scale: Tensor, keep_rows: bool
) -> tuple[Tensor, Tensor]:
    call = uses[0].call
    if call.kind == "embedding":
        return _embedding_factors(uses, scale)
    pairs = [layer_rows(use, False, sharing) for use in uses]
    share = 1 / pairs[0][0].new_tensor(sum(a.shape[-2] for a, _ in pairs))
    # Rows of several uses are not joined: only a single use is kept as rows.
    keep_rows = keep_rows and len(pairs) == 1
    inputs = _total([_second_moment(a, share, bias, keep_rows) for a, _ in pairs])
    outputs = _total([_second_moment(g, scale, False, keep_rows) for _, g in pairs])
    if inputs.ndim == 3 and inputs.shape[0] == 1:
        inputs, outputs = inputs[0], outputs[0]
    if call.kind == "linear" and call.options == ("in_out",):
        return inputs, outputs
    return outputs, inputs


def _embedding_factors(uses: tuple[LayerUse, ...], scale: Tensor) -> tuple[Tensor, Tensor]:
    """The input is one-hot: its second moment is the diagonal of the tokens' frequencies."""
    padding, vocabulary = uses[0].call.options
    counts, outputs = [], []
    for use in uses:
        ids, g = use.input_rows().reshape(-1), use.grad_rows()
        g = rearrange(g.to(factor_dtype(g)), "v n t d -> v (n t) d")
        kept = torch.ones_like(ids, dtype=g.dtype)
        if padding is not None:
            kept = (ids != padding).to(g.dtype)
        g = (g * kept.unsqueeze(-1)).flatten(0, 1)
        counts.append(g.new_zeros(vocabulary).index_add(0, ids, kept))
        outputs.append(g.mT @ g)
    total = _total(counts)
    return total / total.sum(), _total(outputs) * scale.to(total.dtype)


def _unit_blocks(uses: tuple[LayerUse, ...], bias: bool, scale: Tensor) -> Tensor:
    """(U, 2, 2): the exact Fisher block of each unit's scale and bias, from per-example sums."""
    blocks = []
    for use in uses:
        x, g = use.input_rows(), use.grad_rows()
        g = g.to(factor_dtype(g))
        gradients = [(g * x).sum(-2)] + ([g.sum(-2)] if bias else [])
        p = torch.stack(gradients, -1)
        blocks.append(torch.einsum("vnup,vnuq->upq", p, p))
    return _total(blocks) * scale.to(blocks[0].dtype)


def _second_moment(rows: Tensor, scale: Tensor, bias: bool, keep_rows: bool) -> Tensor:
    """``scale rows^T rows``, of the rows with a 1 appended if there is a bias; or those rows."""
    scale = scale.to(rows.dtype)
    if rows.shape[-2] < rows.shape[-1]:
        # The rows are smaller than their product: they, not it, are scaled and extended.
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1) if bias else rows
        rows = rows * scale.sqrt()
        return rows if keep_rows else rows.mT @ rows
    gram = rows.mT @ rows
    if bias:
        sums = rows.sum(-2, keepdim=True)
        count = torch.full_like(sums[..., :1], rows.shape[-2])
        gram = torch.cat([torch.cat([gram, sums], -2), torch.cat([sums, count], -1).mT], -1)
    return gram * scale


def _total(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)
