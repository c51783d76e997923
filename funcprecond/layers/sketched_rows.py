"""The rows of one layer for Woodbury's formula, of which a sketch may stand for all columns.

A row of U is the gradient of one example in a layer, times the root of its weight. Woodbury's
formula needs ``U U^T``, ``U v`` and ``U^T y``. For a layer of many columns, the first two are
estimated from a few columns that are drawn at random (Yang et al., arXiv 2006.05924).
"""

import dataclasses
import math

import torch
from torch import Tensor

from funcprecond.layers.block_matrix import join, split
from funcprecond.layers.blocks import split_block
from funcprecond.layers.example_gradients import ExampleGradients
from funcprecond.linalg import treemath
from funcprecond.linalg.eigh import separated_eigh
from funcprecond.linalg.precision import decomposition_dtype
from funcprecond.tree import Params

__all__ = ["FactoredRows", "FormedRows", "columns", "factors", "leading_positions"]


@dataclasses.dataclass(frozen=True)
class FactoredRows:
    """Rows that are kept as factors: row r is the matrix ``√weight_r Σ_t left_rt right_rt^T``.

    The matrix is that of :mod:`funcprecond.layers.block_matrix`, in each of J groups.

    Attributes:
        left: (J, R, T, rows), or the indices (1, R, T) of one-hot vectors, for an embedding.
        right: (J, R, T, columns).
        weights: (R,).
        chosen: the indices that the sketch takes from the axes "left" and "right". An axis without
            an entry is taken whole.
        block: ``"weight+bias"`` or ``"weight"``.
        like: tensors with the shapes of the parameters.
    """

    left: Tensor
    right: Tensor
    weights: Tensor
    chosen: dict[str, Tensor]
    block: str
    like: Params

    @property
    def one_hot(self) -> bool:
        """Whether the left factors are one-hot vectors, stored as indices."""
        return self.left.ndim == 3

    def gram(self) -> Tensor:
        """``U U^T``, or its unbiased estimate from the sketch, (R, R)."""
        left, right = self._sketched()
        if self.one_hot:
            # Only the number of tokens that occur matters for the choice of the algorithm.
            shape = (left.numel(), right.shape[-1])
            rows = ExampleGradients(left, right.unsqueeze(1), "", None, shape, True)
        else:
            rows = ExampleGradients(right, left.unsqueeze(1), "", None, (), False)
        return _scaled(rows.gram(), self.weights)

    def matvec(self, vector: Params) -> Tensor:
        """``U v`` for v shaped like the parameters, or its unbiased estimate, (R,)."""
        left, right = self._sketched()
        if self.one_hot:
            (weight, _), place = split_block(self.block), self.chosen.get("right")
            table = vector[weight].reshape(-1, self.right.shape[-1]).to(right.dtype)
            products = (_taken(table, place)[left] * right).sum((0, 2, 3))
            return products * self.weights.sqrt()
        matrix = self._matrix(vector).to(right.dtype)
        mapped = torch.einsum("jnti,jio->jnto", right, matrix)
        return (mapped * left).sum((0, 2, 3)) * self.weights.sqrt()

    def rmatvec(self, weights: Tensor) -> Params:
        """``U^T y`` with all columns, shaped like the parameters of the block."""
        right = self.right * (weights * self.weights.sqrt()).to(self.right.dtype)[:, None, None]
        if self.one_hot:
            weight, _ = split_block(self.block)
            shape = self.like[weight].shape
            flat = right.new_zeros(math.prod(shape[:-1]), shape[-1])
            flat = flat.index_add(0, self.left.flatten(), right.flatten(0, 2))
            return {weight: flat.reshape(shape)}
        left, right = self.left.flatten(1, 2).mT, right.flatten(1, 2)
        weight, bias = split_block(self.block)
        if bias is None or not self._bias_is_column:
            return split(left @ right, self.like, self.block)
        # Two products, because a matrix of both would be copied to separate them.
        return {
            weight: (left @ right[..., :-1]).reshape(self.like[weight].shape),
            bias: (left @ right[..., -1:]).reshape(self.like[bias].shape),
        }

    @property
    def _bias_is_column(self) -> bool:
        """Whether the bias, if there is one, belongs to the columns of the matrix."""
        groups, rows = self.left.shape[0], self.left.shape[-1]
        return groups * rows == self.like[split_block(self.block)[0]].shape[0]

    def _matrix(self, vector: Params) -> Tensor:
        """The matrix of a vector, or its columns and rows in the sketch, as (J, columns, rows)."""
        groups, rows, chosen = self.left.shape[0], self.left.shape[-1], self.chosen
        weight, bias = split_block(self.block)
        if bias is not None and groups == 1 and "left" in chosen and self._bias_is_column:
            # The rows are selected first, which is a copy of whole rows and makes the rest small.
            vector = {k: vector[k].index_select(0, chosen["left"]) for k in (weight, bias)}
            few = join(vector, vector, self.block, len(chosen["left"])).unsqueeze(0)
            few = few * (rows / len(chosen["left"])) ** 0.5
            return _taken(few, chosen.get("right")).mT
        matrix = join(vector, vector, self.block, rows, groups)
        matrix = _taken(matrix, chosen.get("right"))
        return _taken(matrix.mT, chosen.get("left")).reshape(groups, matrix.shape[-1], -1)

    def _sketched(self) -> tuple[Tensor, Tensor]:
        left = self.left if self.one_hot else _taken(self.left, self.chosen.get("left"))
        return left, _taken(self.right, self.chosen.get("right"))


@dataclasses.dataclass(frozen=True)
class FormedRows:
    """Rows that are formed, with the parameters of the block one after the other.

    Attributes:
        rows: (R, D); U is these rows times the roots of their weights.
        weights: (R,).
        like: tensors with the shapes of the parameters, in their order.
    """

    rows: Tensor
    weights: Tensor
    like: Params

    def gram(self) -> Tensor:
        """``U U^T``, (R, R)."""
        return _scaled(self.rows @ self.rows.mT, self.weights)

    def matvec(self, vector: Params) -> Tensor:
        """``U v`` for v shaped like the parameters, (R,)."""
        flat = treemath.ravel({k: vector[k].to(self.rows.dtype) for k in self.like})
        return (self.rows @ flat) * self.weights.sqrt()

    def rmatvec(self, weights: Tensor) -> Params:
        """``U^T y``, shaped like the parameters."""
        weights = (weights * self.weights.sqrt()).to(self.rows.dtype)
        return treemath.unravel(weights @ self.rows, self.like)


def columns(size: int, uniforms: Tensor) -> Tensor:
    """Draw s of ``size`` indices at random, one from each of s equal parts of the range.

    An index is drawn ``s / size`` times in the mean, which makes :class:`FactoredRows` unbiased.

    Args:
        size: the number of indices.
        uniforms: (s,), uniform numbers in [0, 1).
    """
    steps = torch.arange(len(uniforms), device=uniforms.device)
    found = (steps + uniforms) * (size / len(uniforms))
    return found.to(torch.int64).clamp_max(size - 1)


def factors(rows: ExampleGradients) -> tuple[Tensor, Tensor]:
    """The factors (left, right) of :class:`FactoredRows`, for V N rows of an affine layer."""
    grads = rows.grads.flatten(1, 2)
    inputs, cotangents = rows.inputs, rows.grads.shape[1]
    if cotangents > 1:
        inputs = inputs.repeat(1, cotangents, *(1,) * (inputs.ndim - 2))
    return (inputs, grads) if rows.one_hot or rows.inputs_first else (grads, inputs)


def leading_positions(rows: ExampleGradients, rank: int) -> ExampleGradients:
    """Replace the positions of each example by at most ``rank`` combinations of them.

    They belong to the largest singular values of the example's output gradients g, (T, o). With
    the singular vectors V, (T, r), the row ``g^T a`` becomes ``(V^T g)^T (V^T a)``, which is the
    same if r is the rank of g.

    Args:
        rows: the rows of an affine layer that is no embedding.
        rank: r.

    Returns:
        The rows, with one cotangent: (J, V N, r, i) inputs and (J, 1, V N, r, o) gradients.
    """
    g = rows.grads.flatten(1, 2)
    a = rows.inputs.repeat(1, rows.grads.shape[1], 1, 1)
    # The singular vectors come from the smaller of the Gram matrices, (T, T) or (o, o).
    by_outputs = g.shape[-1] < g.shape[-2]
    gram = (g.mT @ g if by_outputs else g @ g.mT).to(decomposition_dtype(g))
    vectors = separated_eigh(gram, 10 * torch.finfo(gram.dtype).eps)[1][..., -rank:].mT.to(g.dtype)
    if by_outputs:
        g, a = vectors, (vectors @ g.mT) @ a
    else:
        g, a = vectors @ g, vectors @ a
    return ExampleGradients(
        a, g.unsqueeze(1), rows.weight, rows.bias, rows.shape, rows.inputs_first
    )


def _scaled(gram: Tensor, weights: Tensor) -> Tensor:
    roots = weights.sqrt()
    return gram * roots * roots.unsqueeze(1)


def _taken(x: Tensor, chosen: Tensor | None) -> Tensor:
    """The chosen columns of x on the scale that makes inner products of them unbiased."""
    if chosen is None:
        return x
    return x.index_select(-1, chosen) * (x.shape[-1] / len(chosen)) ** 0.5
