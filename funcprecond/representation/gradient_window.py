"""Gradients of several steps as the rows of ``C = U^T U``, with their Gram matrix."""

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.gradient_rows import put_row, truncate
from funcprecond.tree import Params, state, static

__all__ = ["GradientWindow"]


@state
class GradientWindow:
    """R gradients of all parameters jointly, in one stacked tensor; unused rows are zero.

    Attributes:
        stacked: the gradients, (R, P), with the parameters one after the other.
        dots: their inner products, (R, R).
        weights: (R,); the rows of U are the gradients times the roots of their weights.
        names, shapes: the parameters, in their order.
    """

    stacked: Tensor
    dots: Tensor
    weights: Tensor
    names: tuple[str, ...] = static()
    shapes: tuple[tuple[int, ...], ...] = static()

    @classmethod
    def init(cls, params: Params, count: int, weight: float = 0.0) -> "GradientWindow":
        """R rows of zeros.

        Args:
            params: the parameters.
            count: R.
            weight: the weight of each row.

        Returns:
            The representation.
        """
        flat = treemath.ravel_wide(params)
        return cls(
            flat.new_zeros((count, len(flat))),
            flat.new_zeros((count, count)),
            flat.new_full((count,), weight),
            tuple(params),
            tuple(tuple(p.shape) for p in params.values()),
        )

    @property
    def covered(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that this state covers, by name."""
        return dict(zip(self.names, self.shapes, strict=True))

    def put(self, grads: Params, place: Tensor, weights: Tensor) -> "GradientWindow":
        """Put a gradient in the place of a row.

        Args:
            grads: the gradient.
            place: the number of the row, 0-d.
            weights: the new weights of all rows, (R,).

        Returns:
            The new representation. Costs a copy of all rows, and one product with them.
        """
        g = treemath.ravel({k: grads[k].to(self.stacked.dtype) for k in self.names})
        here = torch.arange(len(self.weights), device=place.device) == place
        stacked, dots = put_row(self.stacked, self.dots, g, here)
        return GradientWindow(stacked, dots, weights, self.names, self.shapes)

    def truncated(self, rank: int) -> "GradientWindow":
        """The same matrix with its largest eigenvalues only.

        Args:
            rank: k, the number of eigenvalues that are kept.

        Returns:
            The representation, in whose first k rows are the eigenvectors times the roots of their
            eigenvalues, with weights of 1. Costs an (R, R) eigendecomposition and k R P
            operations.
        """
        found = truncate(self.stacked, self.dots, self.weights, rank)
        return GradientWindow(*found, self.names, self.shapes)

    def gram(self) -> Tensor:
        """``U U^T``, (R, R)."""
        roots = self.weights.sqrt()
        return self.dots * roots * roots.unsqueeze(1)

    def matvec(self, vector: Params) -> Tensor:
        """``U v`` for v shaped like the parameters, (R,)."""
        v = treemath.ravel({k: vector[k].to(self.stacked.dtype) for k in self.names})
        return (self.stacked @ v) * self.weights.sqrt()

    def rmatvec(self, weights: Tensor) -> Params:
        """``U^T y``, shaped like the parameters."""
        y = (weights * self.weights.sqrt()).to(self.stacked.dtype)
        found, start = {}, 0
        flat = y @ self.stacked
        for name, shape in self.covered.items():
            size = torch.Size(shape).numel()
            found[name] = flat[start : start + size].reshape(shape)
            start += size
        return found
