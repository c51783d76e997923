"""Kronecker-factored curvature with exact damping, by eigendecompositions of the factors."""

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
    """The eigenvectors and eigenvalues of both factors of each block, and the other curvature.

    A diagonal factor, such as the left one of an embedding, has no eigenvectors.

    Attributes:
        left_vectors, right_vectors: the eigenvectors, as columns, by block.
        left_values, right_values: the eigenvalues, by block.
        units: the averaged blocks of the units of norm layers.
        others: the averaged diagonal for parameters that no layer covers.
    """

    left_vectors: dict[str, Tensor]
    right_vectors: dict[str, Tensor]
    left_values: dict[str, Tensor]
    right_values: dict[str, Tensor]
    units: dict[str, Tensor]
    others: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Eigen:
    """``(left ⊗ right + damping I)^-1``, exactly, because it is diagonal in the eigenbases.

    Attributes:
        damping: added to the curvature, in units of the loss. It is used at every step, so that a
            schedule needs no refresh.
    """

    damping: float | Tensor = 1e-3
    accepts: ClassVar[tuple[type, ...]] = (KroneckerIO,)
    needs: ClassVar[tuple[Need, ...]] = (GRADIENT_ROWS,)
    staggers: ClassVar[bool] = False

    def init(self, representation: KroneckerIO) -> EigenFactor:
        """Empty dicts, like those of the representation.

        Args:
            representation: the representation before the first measurement.

        Returns:
            The factor.
        """
        return EigenFactor({}, {}, {}, {}, {}, {})

    def prepare(self, representation: KroneckerIO, previous: EigenFactor) -> EigenFactor:
        """Decompose the factors.

        Args:
            representation: the curvature.
            previous: not used.

        Returns:
            The factor. Costs one batched eigendecomposition per size of factor.
        """
        w = representation.divisors()
        left = {k: x / w(k) for k, x in representation.left.items()}
        right = {k: x / w(k) for k, x in representation.right.items()}
        left_values, left_vectors = eigenbases(left)
        right_values, right_vectors = eigenbases(right)
        return EigenFactor(
            left_vectors,
            right_vectors,
            left_values,
            right_values,
            {k: x / w(k) for k, x in representation.units.items()},
            {k: x / w(k) for k, x in representation.others.items()},
        )

    def apply(self, factor: EigenFactor, grads: Params, evidence: Evidence | None = None) -> Params:
        """Rotate the gradient of each layer, divide it, and rotate it back.

        Args:
            factor: the result of :meth:`prepare`.
            grads: the gradient.
            evidence: the evidence of this step, from which the rows of the gradient are taken, if
                it has them.

        Returns:
            The direction. Costs four products per layer, two of which multiply the rows of the
            gradient instead of the gradient where that costs less.
        """

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
    """``left^T gradient right``, formed; None stands for the identity."""
    rotated = gradient.map(
        lambda x: x if left is None else x @ left, lambda x: x if right is None else x @ right
    )
    return rotated.matrix()


def rotate_back(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> LayerGradient:
    """``left matrix right^T``; None stands for the identity."""
    matrix = matrix if left is None else left @ matrix
    return LayerGradient(None, matrix if right is None else matrix @ right.mT)


def groups_of(vectors: Tensor | None) -> int:
    """The number of groups of a block with these eigenvectors; 1 for a diagonal factor, None."""
    return 1 if vectors is None or vectors.ndim == 2 else vectors.shape[0]
