"""Kronecker-factored curvature with exact damping, by eigendecomposition of the factors."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg.eigh import eigenbases
from funcprecond.need import Need
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.solver.layer_gradient import (
    GRADIENT_ROWS,
    BlockShape,
    LayerGradient,
    apply_blocks,
    gradient_rows,
    unit_inverses,
)
from funcprecond.tree import Params, state

__all__ = ["Eigen", "EigenFactor", "groups_of", "rotate", "rotate_back"]


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
    needs: ClassVar[tuple[Need, ...]] = (GRADIENT_ROWS,)
    staggers: ClassVar[bool] = False

    def init(self, representation: KroneckerIO) -> EigenFactor:
        """Empty, as the representation is."""
        return EigenFactor({}, {}, {}, {}, {}, {})

    def prepare(self, representation: KroneckerIO, previous: EigenFactor) -> EigenFactor:
        """Decompose: one batched eigendecomposition for each size of factor."""
        w = representation.normalizer
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

    def apply(self, factor: EigenFactor, grads: Params, evidence: Evidence | None = None) -> Params:
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
            gradient_rows(grads, evidence),
        )


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
