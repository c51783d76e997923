r"""Layer-wise Kronecker factors: output gradients ⊗ inputs.

A layer's block of the Fisher matrix is approximated by ``left ⊗ right``, one factor for each axis
of its weight: for a linear layer ``[W | b]`` of shape (o, i + 1) these are the second moments of
the output gradients, ``left = scale Σ g g^T``, and of the inputs, ``right = mean [a, 1] [a, 1]^T``.
Only the product has meaning; it has the scale of the loss.
"""

import dataclasses
import functools
import math

import torch
from einops import rearrange
from torch import Tensor

from funcprecond.curvature.layer_statistics import Layers, LayerUse, Sharing, split_block
from funcprecond.layers.input_moments import gram, input_factor
from funcprecond.linalg.nearest_kronecker import nearest_kronecker
from funcprecond.linalg.precision import factor_dtype
from funcprecond.problems import Params
from funcprecond.representation import average
from funcprecond.representation.diagonal import zero_weight
from funcprecond.tree import state, static

__all__ = ["KroneckerIO", "as_rows", "layer_rows"]


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
        max_dim: of a longer axis only the factor's diagonal is measured and kept, (o,) or (i + 1,);
            0 is no limit. A convolution of several groups has no limit: its factors are short.
    """

    left: dict[str, Tensor]
    right: dict[str, Tensor]
    units: dict[str, Tensor]
    others: dict[str, Tensor]
    weight: Tensor
    names: tuple[str, ...] = static()
    rows: bool = static(default=False)
    max_dim: int = static(default=0)

    @classmethod
    def init(cls, params: Params, rows: bool = False, max_dim: int = 0) -> "KroneckerIO":
        """Empty."""
        return cls({}, {}, {}, {}, zero_weight(params), tuple(params), rows, max_dim)

    def accumulate(self, value: Layers, decay: average.Decay) -> "KroneckerIO":
        """Take in a measurement of the layers."""
        value, at = value.restrict(self.names), average.at(self.weight, decay)
        kept = self.rows and decay is None
        empty = dataclasses.replace(self, left={}, right={}, units={}, others={}, rows=kept)
        new = empty.with_cotangents(value).with_inputs(value.uses, value.sharing)

        def merge(old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: average.accumulate(old.get(k), x, at) for k, x in new.items()}

        return dataclasses.replace(
            self,
            left=merge(self.left, new.left),
            right=merge(self.right, new.right),
            units=merge(self.units, new.units),
            others=merge(self.others, new.others),
            weight=average.weight(self.weight, at),
        )

    def with_cotangents(self, value: Layers) -> "KroneckerIO":
        """Take in cotangents alone: the factors of output gradients, and all that is no product.

        A sum over many cotangents is taken one by one so, and none of their gradients is kept; the
        inputs' factors come from :meth:`with_inputs`. A tied embedding has both of its factors at
        once, from all cotangents together.
        """
        value = value.restrict(self.names)
        left, right, units = dict(self.left), dict(self.right), dict(self.units)
        for block, uses in value.uses.items():
            if uses[0].call.kind == "norm":
                bias = split_block(block)[1] is not None
                new = _unit_blocks(uses, bias, value.scale)
                units[block] = units[block] + new if block in units else new
                continue
            if _are_tied(uses):
                tied = _tied_factors(uses, value.sharing, value.scale, self.max_dim)
                left[block], right[block] = tied
                continue
            side = right if inputs_are_left(uses[0]) else left
            new = _output_factor(uses, value.sharing, value.scale, self.rows, self.max_dim)
            side[block] = _joined(side[block], new) if block in side else new
        others = {k: d * value.scale for k, d in value.others.items()}
        others = {k: self.others[k] + d if k in self.others else d for k, d in others.items()}
        return dataclasses.replace(self, left=left, right=right, units=units, others=others)

    def with_inputs(
        self, blocks: dict[str, tuple[LayerUse, ...]], sharing: Sharing
    ) -> "KroneckerIO":
        """Take in the inputs of layers whose cotangents are there already."""
        left, right = dict(self.left), dict(self.right)
        for block, uses in blocks.items():
            if uses[0].call.kind == "norm" or _are_tied(uses):
                continue
            bias = split_block(block)[1] is not None
            side = left if inputs_are_left(uses[0]) else right
            side[block] = _inputs_factor(uses, bias, sharing, self.rows, self.max_dim)
        weight = torch.ones_like(self.weight)
        return dataclasses.replace(self, left=left, right=right, weight=weight)

    def block(self, name: str) -> Tensor:
        """A layer's block as a dense matrix, in the order of the flattened ``[W | b]``."""
        left, right = (product(x) / self.weight for x in (self.left[name], self.right[name]))
        left, right = (x.diag() if x.ndim == 1 else x for x in (left, right))
        if left.ndim == 2:
            return torch.kron(left.contiguous(), right.contiguous())
        return torch.block_diag(
            *(torch.kron(x.contiguous(), y.contiguous()) for x, y in zip(left, right, strict=True))
        )


def as_rows(factor: Tensor) -> bool:
    """Whether a factor stands as fewer rows X, for ``X^T X``, than it has columns."""
    return factor.ndim > 1 and factor.shape[-2] < factor.shape[-1]


def product(factor: Tensor) -> Tensor:
    """A factor as a square matrix, of its rows if it is kept as them; a diagonal as it is."""
    return gram(factor) if as_rows(factor) else factor


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two factors: as rows while they are fewer than their columns."""
    if a.ndim == 1:
        return a + b
    if a.shape[-2] + b.shape[-2] < a.shape[-1]:
        return torch.cat([a, b], -2)
    a = product(a)
    return torch.addmm(a, b.mT, b) if b.ndim == 2 and as_rows(b) else a + product(b)


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


def _inputs_factor(
    uses: tuple[LayerUse, ...], bias: bool, sharing: Sharing, keep_rows: bool, max_dim: int
) -> Tensor:
    """The second moment of the inputs, as rows or as its diagonal alone where that is asked for."""
    if uses[0].call.kind == "embedding":
        return frequencies(uses)
    dtype = factor_dtype(uses[0].grads)
    if _is_long(_fan_in(uses[0]) + bias, uses[0], max_dim):
        return _input_diagonal(uses, bias, sharing, dtype)
    inputs = input_factor(uses, bias, sharing, dtype, keep_rows)
    return inputs[0] if inputs.ndim == 3 and inputs.shape[0] == 1 else inputs


def _is_long(length: int, use: LayerUse, max_dim: int) -> bool:
    grouped = use.call.kind.startswith("conv") and use.call.options[4] > 1
    return 0 < max_dim < length and not grouped


def _fan_in(use: LayerUse) -> int:
    if use.call.kind != "conv":
        return use.inputs.shape[1 if use.call.kind == "conv_transpose" else -1]
    return use.inputs.shape[1] * math.prod(use.geometry[0])


def _input_diagonal(
    uses: tuple[LayerUse, ...], bias: bool, sharing: Sharing, dtype: torch.dtype
) -> Tensor:
    """(i,), or (i + 1,): the mean of ``[a, 1]²`` over all rows of a layer's inputs."""
    rows = [use.input_rows().to(dtype) for use in uses]
    rows = [x.mean(-2, keepdim=True) if sharing == "reduce" else x for x in rows]
    mean = torch.cat([x.reshape(-1, x.shape[-1]) for x in rows]).square().mean(0)
    return torch.cat([mean, torch.ones_like(mean[:1])]) if bias else mean


def _are_tied(uses: tuple[LayerUse, ...]) -> bool:
    return len({use.call.kind for use in uses}) > 1


def _tied_factors(
    uses: tuple[LayerUse, ...], sharing: Sharing, scale: Tensor, max_dim: int
) -> tuple[Tensor, Tensor]:
    """A table's uses as an embedding and as a linear layer, ``diag ⊗ right`` each, as one product.

    Of the linear layer's output gradients, one for each of V tokens, only the squares are kept.
    What couples the two uses is left out.
    """
    looked_up = tuple(use for use in uses if use.call.kind == "embedding")
    applied = tuple(use for use in uses if use.call.kind == "linear")
    rows = [_grad_rows(use, sharing) for use in applied]
    squares = _total([g.square().sum(-2) for g in rows]) * scale
    if _is_long(_fan_in(applied[0]), applied[0], max_dim):
        inputs = _input_diagonal(applied, False, sharing, squares.dtype)
    else:
        inputs = input_factor(applied, False, sharing, squares.dtype, False)
    return nearest_kronecker(
        [frequencies(looked_up).to(squares.dtype), squares],
        [_output_factor(looked_up, sharing, scale, False, max_dim), inputs],
    )


def inputs_are_left(use: LayerUse) -> bool:
    """Whether the inputs' factor is that of the weight's axis 0."""
    return use.call.kind in ("embedding", "conv_transpose") or use.call.options == ("in_out",)


def _fan_out(use: LayerUse) -> int:
    call = use.call
    kernel = math.prod(call.options[-1]) if call.kind == "conv_transpose" else 1
    return call.shape[1 if call.kind.startswith("conv") else -1] * kernel


def frequencies(uses: tuple[LayerUse, ...]) -> Tensor:
    """An embedding's input is one-hot: its second moment is the tokens' frequencies."""
    padding, vocabulary = uses[0].call.options
    ids = torch.cat([use.input_rows().reshape(-1) for use in uses])
    kept = torch.ones_like(ids, dtype=factor_dtype(uses[0].grads))
    if padding is not None:
        kept = (ids != padding).to(kept.dtype)
    total = kept.new_zeros(vocabulary).index_add(0, ids, kept)
    return total / total.sum()


def _kept_grad_rows(use: LayerUse) -> Tensor:
    """(M, d): an embedding's output gradients, zero where the input is padding."""
    g = use.grad_rows().to(factor_dtype(use.grads))
    padding = use.call.options[0]
    if padding is not None:
        g = g * (use.input_rows() != padding).unsqueeze(-1)
    return g.flatten(0, -2)


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
    uses: tuple[LayerUse, ...], sharing: Sharing, scale: Tensor, keep_rows: bool, max_dim: int
) -> Tensor:
    """``scale Σ g g^T``, or ``scale^1/2 g`` as rows if they are fewer than their columns."""
    embedding = uses[0].call.kind == "embedding"
    if _is_long(_fan_out(uses[0]), uses[0], max_dim):
        rows = [_kept_grad_rows(use) if embedding else _grad_rows(use, sharing) for use in uses]
        return _total([g.reshape(-1, g.shape[-1]).square().sum(0) for g in rows]) * scale
    if embedding:
        return _total([gram(_kept_grad_rows(use)) for use in uses]) * scale
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
