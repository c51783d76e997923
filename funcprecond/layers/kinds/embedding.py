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
    inputs_first: ClassVar[bool] = True  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        table = call.argument(1, "weight")
        weight, padding = names.of(table), call.argument(2, "padding_idx")
        if not weight:
            return []
        padding = None if padding is None else padding % table.shape[0]
        found = cls(weight=weight, vocabulary=table.shape[0], padding=padding)
        return [Recognized(found, call.argument(0, "input"))]

    def apply(self, params: Params, x: Tensor) -> Tensor:
        rows = F.embedding(x, params[self.weight])
        return rows if self.padding is None else rows * (x != self.padding).unsqueeze(-1)

    def fan_in(self, x: Tensor) -> int:
        return self.vocabulary

    def input_rows(self, x: Tensor) -> Tensor:
        """The indices of the tokens, (N, T)."""
        return x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(-1, 1)

    def grad_rows(self, g: Tensor, x: Tensor) -> Tensor:
        """The rows of the output gradients, (V, N, T, d); zero where the token is the padding."""
        g = g.reshape(g.shape[0], g.shape[1], -1, g.shape[-1])
        if self.padding is None:
            return g
        return g * (self.input_rows(x) != self.padding).unsqueeze(-1)

    def positions(self, x: Tensor, sharing: Sharing) -> int:
        return x.numel() if self.padding is None else int((x != self.padding).sum())

    def input_factor(
        self, uses: Sequence[LayerUse], bias: bool, sharing: Sharing, *, thin: bool = False
    ) -> Tensor:
        """Compute (vocabulary,), the frequencies of the tokens.

        They are the diagonal of the second moment of one-hot inputs, which is diagonal.
        """
        ids = torch.cat([self.input_rows(use.inputs).reshape(-1) for use in uses])
        kept = torch.ones_like(ids, dtype=factor_dtype(uses[0].grads))
        if self.padding is not None:
            kept = (ids != self.padding).to(kept.dtype)
        total = kept.new_zeros(self.vocabulary).index_add(0, ids, kept)
        return total / total.sum()

    def input_diagonal(self, uses: Sequence[LayerUse], bias: bool, sharing: Sharing) -> Tensor:
        return self.input_factor(uses, bias, sharing)

    def output_rows(self, use: LayerUse, sharing: Sharing) -> Tensor:
        # The input of an example is the sum of its one-hot vectors, so "reduce" is like "expand".
        g = self.grad_rows(use.grads, use.inputs)
        return g.to(factor_dtype(g)).flatten(-4, -2)

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
