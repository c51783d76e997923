"""Embeddings: linear layers whose inputs are one-hot vectors, stored as indices."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.layer_call import FunctionCall, LayerUse, Names, Recognized, Sharing
from funcprecond.layers.second_moments import joined
from funcprecond.linalg.precision import factor_dtype
from funcprecond.tree import Params

__all__ = ["Embedding"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedding(AffineCall):
    """A use of a table with one row of length d for each token.

    Attributes:
        vocabulary: the number of tokens.
        padding: the token whose row of the table gets no gradient, or None.
    """

    vocabulary: int
    padding: int | None

    functions = (F.embedding,)
    one_hot: ClassVar[bool] = True
    first_axis: ClassVar[bool] = False
    inputs_first: ClassVar[bool] = True  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        # The recorder follows the rows that are looked up, and asks with all arguments by position.
        table = call.argument(1, "weight")
        weight, padding = names.of(table), call.argument(2, "padding_idx")
        if not weight:
            return []
        padding = None if padding is None else padding % table.shape[0]
        found = cls(weight=weight, vocabulary=table.shape[0], padding=padding)
        return [Recognized(found, call.argument(0, "input"))]

    def apply(self, params: Params, x: Tensor) -> Tensor:
        rows = F.embedding(x, params[self.weight].reshape(self.vocabulary, -1))
        return rows if self.padding is None else rows * (x != self.padding).unsqueeze(-1)

    def fan_in(self, x: Tensor) -> int:
        return self.vocabulary

    def cut_inputs(self, x: Tensor) -> Tensor:
        """The indices of the tokens, (N, T)."""
        return x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(-1, 1)

    def cut_grads(self, g: Tensor, x: Tensor) -> Tensor:
        """The rows of the output gradients, (V, N, T, d); zero where the token is the padding."""
        g = g.reshape(g.shape[0], g.shape[1], -1, g.shape[-1])
        if self.padding is None:
            return g
        return g * (self.cut_inputs(x) != self.padding).unsqueeze(-1)

    def input_factor(
        self, uses: Sequence[LayerUse], bias: bool, sharing: Sharing, *, thin: bool = False
    ) -> Tensor:
        """Compute (vocabulary,), the diagonal of the second moment of the one-hot inputs.

        With "expand" it has the frequencies of the tokens, and the second moment is diagonal. With
        "reduce" it has the mean squares of the frequencies within an example.
        """
        dtype = factor_dtype(uses[0].grads)
        if sharing == "reduce":
            shares = [use.call.token_shares(use.inputs, dtype) for use in uses]
            return torch.cat(shares).square().mean(0)
        ids = torch.cat([self.input_rows(use.inputs).reshape(-1) for use in uses])
        kept = self._is_kept(ids).to(dtype)
        total = kept.new_zeros(self.vocabulary).index_add(0, ids, kept)
        return total / total.sum()

    def token_shares(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute (N, vocabulary), the share of each token in the positions of an example."""
        ids = self.input_rows(x)
        kept = self._is_kept(ids).to(dtype) / ids.shape[1]
        return kept.new_zeros(ids.shape[0], self.vocabulary).scatter_add(1, ids, kept)

    def _is_kept(self, ids: Tensor) -> Tensor:
        if self.padding is None:
            return torch.ones_like(ids, dtype=torch.bool)
        return ids != self.padding

    def input_diagonal(self, uses: Sequence[LayerUse], bias: bool, sharing: Sharing) -> Tensor:
        return self.input_factor(uses, bias, sharing)

    def input_mean(self, uses: Sequence[LayerUse], bias: bool) -> Tensor:
        """Compute (vocabulary,), the frequencies of the tokens: the mean of one-hot rows."""
        return self.input_factor(uses, bias, "expand")

    def second_moments(
        self,
        uses: Sequence[LayerUse],
        bias: bool,
        left: Tensor | None = None,
        right: Tensor | None = None,
    ) -> Tensor:
        """Compute (vocabulary, d), as :meth:`AffineCall.second_moments`.

        The gradients of equal tokens within an example are added before they are squared.
        """
        ids = joined([self.input_rows(use.inputs) for use in uses], -1)
        g = joined([self.grad_rows(use.grads, use.inputs) for use in uses], -2)
        g = g.to(factor_dtype(g)) if right is None else g.to(right.dtype) @ right
        same = (ids.unsqueeze(-1) == ids.unsqueeze(-2)).to(g.dtype)
        squares = ((same @ g) * g).sum(0).flatten(0, 1)
        return g.new_zeros(self.vocabulary, g.shape[-1]).index_add(0, ids.reshape(-1), squares)
