r"""Layer-wise Kronecker factors: output gradients ⊗ inputs.

A layer's block of the Fisher matrix is approximated by ``left ⊗ right``, one factor for each axis
of its weight: for a linear layer ``[W | b]`` of shape (o, i + 1) these are the second moments of
the output gradients, ``left = scale Σ g g^T``, and of the inputs, ``right = mean [a, 1] [a, 1]^T``.
Only the product has meaning; it has the scale of the loss.
"""

import dataclasses
import functools

import torch
from einops import rearrange
from torch import Tensor

from funcprecond.curvature.gram import gram, input_factor
from funcprecond.curvature.layers import Layers, LayerUse, Sharing, split_block
from funcprecond.problem import Params
from funcprecond.representation import average
from funcprecond.representation.diagonal import factor_dtype, zero_weight
from funcprecond.representation.nearest_kronecker import nearest_kronecker
from funcprecond.tree import state, static

__all__ = ["KroneckerIO", "layer_rows"]


@state
class KroneckerIO:
    """Kronecker factors of every layer, and what stands in where there is no such layer.

    Empty until the first measurement, since layers are found by running the model. All but
    ``weight`` are totals: divided by it they are the averages.

    Attributes:
        left: for each block ``"weight+bias"`` (or ``"weight"``) the factor of the weight's axis 0:
            (o, o); (J, o / J, o / J) for a convolution of J groups; (V,), a diagonal, for an
            embedding, be it tied to a linear layer or not.
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

    def with_cotangents(self, value: Layers) -> "KroneckerIO":
        """Take in further cotangents of the inputs that were measured last.

        A sum over many cotangents is taken one by one so, and none of their gradients is kept.
        """
        value = value.restrict(self.names)
        left, right, units = dict(self.left), dict(self.right), dict(self.units)
        for block, uses in value.uses.items():
            if uses[0].call.kind == "norm":
                bias = split_block(block)[1] is not None
                units[block] = units[block] + _unit_blocks(uses, bias, value.scale)
                continue
            side = right if inputs_are_left(uses[0]) else left
            new = _output_factor(uses, value.sharing, value.scale, self.rows)
            side[block] = _joined(side[block], new)
        others = {k: self.others[k] + d * value.scale for k, d in value.others.items()}
        return dataclasses.replace(self, left=left, right=right, units=units, others=others)

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


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two factors: as rows while they are fewer than their columns."""
    if a.shape[-2] + b.shape[-2] < a.shape[-1]:
        return torch.cat([a, b], -2)
    return product(a) + product(b)


def layer_rows(use: LayerUse, bias: bool, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """The rows whose second moments are a layer's factors, in float32 or wider.

    With "expand" every position of an example is a row of its own: exact for losses with a term a
    position. With "reduce" inputs are averaged and output gradients summed over the positions:
    exact where the outputs are pooled over them (Eschenhagen et al., arXiv 2311.00636).

    Returns:
        (..., M, i) inputs, with ones appended if there is a bias, and (..., V M, o) output
        gradients; the leading axis is a convolution's groups.
    """
    a, g = use.input_rows(), _grad_rows(use, sharing)
    if sharing == "reduce":
        a = a.mean(-2, keepdim=True)
    a = rearrange(a.to(g.dtype), "... n t i -> ... (n t) i")
    if bias:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    return a, g


def _factors(
    uses: tuple[LayerUse, ...], bias: bool, sharing: Sharing, scale: Tensor, keep_rows: bool
) -> tuple[Tensor, Tensor]:
    if len({use.call.kind for use in uses}) > 1:
        return _tied_factors(uses, sharing, scale)
    if uses[0].call.kind == "embedding":
        return frequencies(uses), _embedding_moment(uses) * scale
    outputs = _output_factor(uses, sharing, scale, keep_rows)
    inputs = input_factor(uses, bias, sharing, outputs.dtype, keep_rows)
    if inputs.ndim == 3 and inputs.shape[0] == 1:
        inputs = inputs[0]
    return (inputs, outputs) if inputs_are_left(uses[0]) else (outputs, inputs)


def _tied_factors(
    uses: tuple[LayerUse, ...], sharing: Sharing, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """A table's uses as an embedding and as a linear layer, ``diag ⊗ right`` each, as one product.

    Of the linear layer's output gradients, one for each of V tokens, only the squares are kept.
    What couples the two uses is left out.
    """
    looked_up = tuple(use for use in uses if use.call.kind == "embedding")
    applied = tuple(use for use in uses if use.call.kind == "linear")
    rows = [_grad_rows(use, sharing) for use in applied]
    squares = _total([g.square().sum(-2) for g in rows]) * scale
    inputs = input_factor(applied, False, sharing, squares.dtype, False)
    return nearest_kronecker(
        [frequencies(looked_up).to(squares.dtype), squares],
        [_embedding_moment(looked_up) * scale, inputs],
    )


def inputs_are_left(use: LayerUse) -> bool:
    """Whether the inputs' factor is that of the weight's axis 0."""
    return use.call.kind == "embedding" or use.call.options == ("in_out",)


def frequencies(uses: tuple[LayerUse, ...]) -> Tensor:
    """An embedding's input is one-hot: its second moment is the tokens' frequencies."""
    padding, vocabulary = uses[0].call.options
    ids = torch.cat([use.input_rows().reshape(-1) for use in uses])
    kept = torch.ones_like(ids, dtype=factor_dtype(uses[0].grads))
    if padding is not None:
        kept = (ids != padding).to(kept.dtype)
    total = kept.new_zeros(vocabulary).index_add(0, ids, kept)
    return total / total.sum()


def _embedding_moment(uses: tuple[LayerUse, ...]) -> Tensor:
    padding = uses[0].call.options[0]
    parts = []
    for use in uses:
        g = use.grad_rows().to(factor_dtype(use.grads))
        if padding is not None:
            g = g * (use.input_rows() != padding).unsqueeze(-1)
        parts.append(gram(g.flatten(0, -2)))
    return _total(parts)


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


def _grad_rows(use: LayerUse, sharing: Sharing) -> Tensor:
    g = use.grad_rows()
    if sharing == "reduce":
        g = g.sum(-2, keepdim=True)
    return rearrange(g.to(factor_dtype(g)), "... v n t o -> ... (v n t) o")


def _output_factor(
    uses: tuple[LayerUse, ...], sharing: Sharing, scale: Tensor, keep_rows: bool
) -> Tensor:
    """``scale Σ g g^T``, or ``scale^1/2 g`` as rows if they are fewer than their columns."""
    if uses[0].call.kind == "embedding":
        return _embedding_moment(uses) * scale
    # Rows of several uses are not joined: only a single use is kept as rows.
    keep_rows = keep_rows and len(uses) == 1
    parts = []
    for use in uses:
        g = use.grads
        if use.call.kind == "conv" and sharing == "expand":
            groups = use.call.options[4]
            g = rearrange(g.to(factor_dtype(g)).flatten(3), "v n (j o) t -> (v n) j o t", j=groups)
            if g.shape[2] <= g.shape[3]:
                # No larger than the gradients themselves, which need not be moved for it.
                parts.append((g @ g.mT).sum(0) * scale)
                continue
        rows = _grad_rows(use, sharing)
        if rows.shape[-2] < rows.shape[-1]:
            rows = rows * scale.to(rows.dtype).sqrt()
            parts.append(rows if keep_rows else gram(rows))
        else:
            parts.append(gram(rows) * scale)
    total = _total(parts)
    return total[0] if total.ndim == 3 and total.shape[0] == 1 else total


def _total(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)
