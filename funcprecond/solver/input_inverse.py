"""The inverse of curvature that acts on the inputs of layers only, ``I ⊗ A``."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg.batching import by_shape
from funcprecond.linalg.damped_factor import (
    damped_factor,
    mean_eigenvalue,
    rounding,
    solve_damped,
)
from funcprecond.need import Need
from funcprecond.representation.input_moments import InputMoments
from funcprecond.representation.layer_averages import parameters
from funcprecond.solver.layer_gradient import (
    GRADIENT_ROWS,
    BlockShape,
    LayerGradient,
    apply_blocks,
    gradient_rows,
)
from funcprecond.tree import Params, state

__all__ = ["InputInverse", "InputInverseFactor"]


@state
class InputInverseFactor:
    """The damped second moments of the inputs, inverted.

    Attributes:
        left, right: the inverses by block, or what
            :func:`funcprecond.linalg.damped_factor.damped_factor` gives for thin and diagonal ones.
        ridges: what was added to each, by block.
    """

    left: dict[str, Tensor]
    right: dict[str, Tensor]
    ridges: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class InputInverse:
    """``[∇W | ∇b] (A + λ ā I)^-1``, where ā is the mean of A's eigenvalues.

    Parameters without A have the curvature 1, so that their gradient is divided by ``1 + λ``.

    Attributes:
        damping: λ, relative to the mean of the eigenvalues, because A has the units of squared
            activations, which differ between layers. Where A is zero, nothing is divided.
    """

    damping: float | Tensor = 1e-2
    accepts: ClassVar[tuple[type, ...]] = (InputMoments,)
    needs: ClassVar[tuple[Need, ...]] = (GRADIENT_ROWS,)
    staggers: ClassVar[bool] = False

    def init(self, representation: InputMoments) -> InputInverseFactor:
        """Empty dicts, like those of the representation.

        Args:
            representation: the representation before the first measurement.

        Returns:
            The factor.
        """
        return InputInverseFactor({}, {}, {})

    def prepare(
        self, representation: InputMoments, previous: InputInverseFactor
    ) -> InputInverseFactor:
        """Invert the damped second moments.

        Args:
            representation: the curvature.
            previous: not used.

        Returns:
            The factor. Costs one batched Cholesky decomposition per size of A.
        """
        left, right = representation.averages()
        moments = {**left, **right}
        means = {k: mean_eigenvalue(x) for k, x in moments.items()}
        ridges = {
            k: torch.where(m > 0, (self.damping * m).maximum(rounding(moments[k])), 1.0)
            for k, m in means.items()
        }
        inverses = by_shape(
            lambda x, ridge, _: damped_factor(x, ridge, invert=True),
            list(moments.values()),
            list(ridges.values()),
            static=[None] * len(moments),
        )
        found = dict(zip(moments, inverses, strict=True))
        return InputInverseFactor({k: found[k] for k in left}, {k: found[k] for k in right}, ridges)

    def apply(
        self, factor: InputInverseFactor, grads: Params, evidence: Evidence | None = None
    ) -> Params:
        """Solve for each layer, on the side of its inputs.

        Args:
            factor: the result of :meth:`prepare`.
            grads: the gradient.
            evidence: the evidence of this step, from which the rows of the gradient are taken, if
                it has them.

        Returns:
            The direction. Costs one product per layer.
        """

        def side(factors: dict[str, Tensor], block: str, x: Tensor) -> Tensor:
            if block not in factors:
                return x
            return solve_damped(factors[block], factor.ridges[block], x, invert=True)

        def solve(block: str, gradient: LayerGradient) -> LayerGradient:
            return gradient.map(
                lambda x: side(factor.left, block, x), lambda x: side(factor.right, block, x)
            )

        shapes = {
            k: BlockShape.of_side(
                grads, k, factor.left.get(k), factor.right.get(k), max(1, ridge.numel())
            )
            for k, ridge in factor.ridges.items()
        }
        covered = {name for block in shapes for name in parameters(block)}
        others = {k: 1.0 for k in grads if k not in covered}
        rows = gradient_rows(grads, evidence)
        return apply_blocks(grads, shapes, solve, {}, others, self.damping, rows)
