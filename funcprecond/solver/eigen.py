"""Kronecker-factored curvature with exact damping, by eigendecomposition of the factors."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.layers.blocks import Layers
from funcprecond.linalg.batching import by_shape
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.solver.layer_gradient import (
    GRADIENT_ROWS,
    BlockShape,
    LayerGradient,
    apply_blocks,
    unit_inverses,
)
from funcprecond.tree import Params, state

__all__ = ["Eigen", "EigenFactor", "eigenbases", "groups_of", "rotate", "rotate_back"]


@state
class EigenFactor:
    """Eigenvectors and eigenvalues of both factors of each block, and the rest's curvature.

    A diagonal factor, such as an embedding's left one, has no vectors.
    """

    left_vectors: dict[str, Tensor]
    right_vectors: dict[str, Tensor]
    left_values: dict[str, Tensor]
    right_values: dict[str, Tensor]
    units: dict[str, Tensor]
    others: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Eigen:
    """``(left ⊗ right + damping I)^-1``, exactly: in the product of the eigenbases it is diagonal.

    Attributes:
        damping: added to the curvature, in the loss's units. Read at every step, so a schedule
            needs no refresh.
    """

    damping: float | Tensor = 1e-3
    accepts: ClassVar[tuple[type, ...]] = (KroneckerIO,)
    rows: ClassVar[LayerStatistics] = GRADIENT_ROWS

    def init(self, representation: KroneckerIO) -> EigenFactor:
        """Empty, as the representation is."""
        return EigenFactor({}, {}, {}, {}, {}, {})

    def prepare(self, representation: KroneckerIO, previous: EigenFactor) -> EigenFactor:
        """Decompose: one batched eigendecomposition for each size of factor."""
        w = representation.weight
        left = {k: x / w for k, x in representation.left.items()}
        right = {k: x / w for k, x in representation.right.items()}
        left_values, left_vectors = eigenbases(left)
        right_values, right_vectors = eigenbases(right)
        return EigenFactor(
            left_vectors,
            right_vectors,
            left_values,
            right_values,
            {k: x / w for k, x in representation.units.items()},
            {k: x / w for k, x in representation.others.items()},
        )

    def apply(self, factor: EigenFactor, grads: Params, rows: Layers | None = None) -> Params:
        """Rotate, divide, rotate back: four products a layer, two of them maybe of rows only."""

        def solve(block: str, gradient: LayerGradient) -> LayerGradient:
            left, right = factor.left_vectors.get(block), factor.right_vectors.get(block)
            lefts, rights = factor.left_values[block], factor.right_values[block]
            values = lefts.unsqueeze(-1) * rights.unsqueeze(-2)
            rotated = rotate(gradient, left, right) / (values + self.damping)
            return rotate_back(rotated, left, right)

        blocks = {
            k: BlockShape(groups_of(factor.right_vectors.get(k)), left.shape[-1])
            for k, left in factor.left_values.items()
        }
        return apply_blocks(
            grads,
            blocks,
            solve,
            unit_inverses(factor.units, self.damping),
            factor.others,
            self.damping,
            rows,
        )


def eigenbases(factors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(eigenvalues, clamped at zero; eigenvectors) of each factor; no vectors for diagonal ones.

    A factor that is not finite has the identity's decomposition times NaN values, so that the fault
    shows in the direction instead of raising inside a compiled step.
    """
    values = {k: x.clamp_min(0.0) for k, x in factors.items() if x.ndim == 1}
    names = [k for k, x in factors.items() if x.ndim > 1]

    def decompose(stack: Tensor, _) -> Tensor:
        symmetric = (stack + stack.mT) / 2
        finite = torch.isfinite(symmetric).all(-1, keepdim=True).all(-2, keepdim=True)
        eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
        spectrum, vectors = torch.linalg.eigh(torch.where(finite, symmetric, eye))
        spectrum = torch.where(finite.squeeze(-1), spectrum.clamp_min(0.0), torch.nan)
        return torch.cat([spectrum.unsqueeze(-2), vectors], -2)

    packed = by_shape(decompose, [factors[k] for k in names], static=[None] * len(names))
    vectors = {}
    for name, x in zip(names, packed, strict=True):
        values[name], vectors[name] = x[..., 0, :], x[..., 1:, :]
    return values, vectors


def rotate(gradient: LayerGradient, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``left^T gradient right``; None stands for the identity."""
    rotated = gradient.map(
        lambda x: x if left is None else x @ left, lambda x: x if right is None else x @ right
    )
    return rotated.matrix()


def rotate_back(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> LayerGradient:
    """``left matrix right^T``."""
    matrix = matrix if left is None else left @ matrix
    return LayerGradient(None, matrix if right is None else matrix @ right.mT)


def groups_of(vectors: Tensor | None) -> int:
    """The number of groups that a block's eigenvectors are for; of a diagonal factor 1."""
    return 1 if vectors is None or vectors.ndim == 2 else vectors.shape[0]
