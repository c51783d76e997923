"""Where the examples are in a tensor: on an axis of their own, or merged with their positions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Place"]


class Place(NamedTuple):
    """Where the examples are in a tensor.

    Attributes:
        axis: the axis that counts them.
        inner: the number of positions of each example that are merged into this axis.
        examples_first: whether the positions of one example follow each other in a merged axis.
    """

    axis: int
    inner: int = 1
    examples_first: bool = True

    def split(self, x: Tensor, lead: int = 0) -> Tensor:
        """Move the examples to an axis of their own.

        Args:
            x: a tensor with the examples at this place, behind ``lead`` other axes.
            lead: the number of axes in front.

        Returns:
            (*lead, N, *shape), where ``shape`` is that of a batch of one example.
        """
        axis = self.axis + lead
        count = x.shape[axis] // self.inner
        if self.examples_first:
            return x.unflatten(axis, (count, self.inner)).movedim(axis, lead)
        return x.unflatten(axis, (self.inner, count)).movedim(axis + 1, lead)

    def join(self, parts: Tensor, lead: int = 0) -> Tensor:
        """The inverse of :meth:`split`."""
        axis = self.axis + lead
        return parts.movedim(lead, axis if self.examples_first else axis + 1).flatten(
            axis, axis + 1
        )

    def take(self, x: Tensor, chosen: Sequence[int]) -> Tensor:
        """Make the batch of some of the examples."""
        parts = self.split(x)
        return self.join(torch.stack([parts[n] for n in chosen]))

    def sum_others(self, x: Tensor) -> Tensor:
        """Sum over everything but the examples, (N,)."""
        return self.split(x).flatten(1).sum(1)

    def spread(self, weights: Tensor, x: Tensor) -> Tensor:
        """Multiply the entries of each example by its weight, (N,)."""
        parts = self.split(x)
        return self.join(parts * weights.reshape(-1, *[1] * (parts.ndim - 1)).to(x.dtype))
