"""Kronecker-factored curvature with damping split between the factors, by Cholesky inverses."""

import dataclasses
from typing import ClassVar, Literal

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
from funcprecond.representation.average import divisor
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

__all__ = ["Cholesky", "CholeskyFactor", "pi"]


@state
class CholeskyFactor:
    """The damped factors of each block, inverted or decomposed, and the other curvature.

    A factor with fewer rows than columns is W in ``(I - W^T W) / ridge``, the inverse of a damped
    thin factor.

    Attributes:
        left, right: the inverse of each damped factor, or its lower Cholesky factor, by block. They
            belong to the totals of the representation.
        units: the inverses of the damped blocks of the units of norm layers.
        others: the averaged diagonal for parameters that no layer covers.
        scale: turns the solution for the totals into that for the averages, 0-d.
        left_ridge, right_ridge: the damping of each factor, by block.
        scales: the scale of the blocks with a normalizer of their own.
    """

    left: dict[str, Tensor]
    right: dict[str, Tensor]
    units: dict[str, Tensor]
    others: dict[str, Tensor]
    scale: Tensor
    left_ridge: dict[str, Tensor]
    right_ridge: dict[str, Tensor]
    scales: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cholesky:
    """``(left + √λ/π I)^-1 G (right + √λ π I)^-1``: the factored damping of Martens & Grosse.

    It is stronger than the exact damping of the same λ by the cross terms
    ``√λ π (left ⊗ I) + √λ/π (I ⊗ right)``. Values of λ therefore do not carry over from
    :class:`funcprecond.solver.Eigen`.

    Attributes:
        damping: λ, in units of the loss.
        split: "pi" takes the ratio of the mean eigenvalues of ``right`` and ``left`` as π². This
            minimizes the trace of the cross terms and makes the result independent of how a scale
            is shared between the factors. "equal" is π = 1.
        invert: whether to form the inverses. This makes a refresh about three times as expensive,
            and a step on dense gradients half as expensive. Otherwise the Cholesky factors are
            kept.
    """

    damping: float | Tensor = 1e-3
    split: Literal["pi", "equal"] = "pi"
    invert: bool = True
    accepts: ClassVar[tuple[type, ...]] = (KroneckerIO,)
    needs: ClassVar[tuple[Need, ...]] = (GRADIENT_ROWS,)
    staggers: ClassVar[bool] = False

    def init(self, representation: KroneckerIO) -> CholeskyFactor:
        """Empty dicts, like those of the representation.

        Args:
            representation: the representation before the first measurement.

        Returns:
            The factor.
        """
        return CholeskyFactor({}, {}, {}, {}, torch.ones_like(representation.normalizer), {}, {})

    def prepare(self, representation: KroneckerIO, previous: CholeskyFactor) -> CholeskyFactor:
        """Decompose the damped factors.

        Args:
            representation: the curvature.
            previous: not used.

        Returns:
            The factor. Costs one batched Cholesky decomposition per size of factor.
        """
        w = representation.divisors()
        gamma = self.damping**0.5
        blocks = list(representation.left)
        weights = [w(k) for k in blocks]
        # The matrices are totals; the ridges are scaled instead of the matrices.
        left = [representation.left[k] for k in blocks]
        right = [representation.right[k] for k in blocks]
        ratio = [
            pi(r, x) if self.split == "pi" else torch.ones_like(representation.normalizer)
            for x, r in zip(left, right, strict=True)
        ]
        matrices = [*left, *right]
        pairs = [(u * gamma, p) for u, p in zip(weights, ratio, strict=True)]
        ridges = [*(g / p for g, p in pairs), *(g * p for g, p in pairs)]
        ridges = [torch.maximum(r, rounding(x)) for x, r in zip(matrices, ridges, strict=True)]
        factors = by_shape(
            lambda x, ridge, _: damped_factor(x, ridge, self.invert),
            matrices,
            ridges,
            static=[None] * len(matrices),
        )
        return CholeskyFactor(
            dict(zip(blocks, factors[: len(blocks)], strict=True)),
            dict(zip(blocks, factors[len(blocks) :], strict=True)),
            unit_inverses({k: x / w(k) for k, x in representation.units.items()}, self.damping),
            {k: x / w(k) for k, x in representation.others.items()},
            divisor(representation.normalizer).square(),
            dict(zip(blocks, ridges[: len(blocks)], strict=True)),
            dict(zip(blocks, ridges[len(blocks) :], strict=True)),
            {k: w(k).square() for k in blocks if k in representation.normalizers},
        )

    def apply(
        self, factor: CholeskyFactor, grads: Params, evidence: Evidence | None = None
    ) -> Params:
        """Solve with both damped factors of each layer.

        Args:
            factor: the result of :meth:`prepare`.
            grads: the gradient.
            evidence: the evidence of this step, from which the rows of the gradient are taken, if
                it has them.

        Returns:
            The direction. Costs two products or solves per layer, with the gradient, or with its
            rows where that costs less.
        """

        def solve(block: str, gradient: LayerGradient) -> LayerGradient:
            left = factor.left[block], factor.left_ridge[block]
            right = factor.right[block], factor.right_ridge[block]
            scale = factor.scales.get(block, factor.scale)
            return gradient.map(
                lambda x: scale * solve_damped(*left, x, self.invert),
                lambda x: solve_damped(*right, x, self.invert),
            )

        blocks = {k: BlockShape.of(left, factor.right[k]) for k, left in factor.left.items()}
        return apply_blocks(
            grads,
            blocks,
            solve,
            factor.units,
            factor.others,
            self.damping,
            gradient_rows(grads, evidence),
        )


def pi(right: Tensor, left: Tensor) -> Tensor:
    """``sqrt(mean eigenvalue of right / that of left)`` for each group; 1 where either is zero."""
    r, x = mean_eigenvalue(right), mean_eigenvalue(left)
    both = (r > 0) & (x > 0)
    # The quotient of the roots is finite also where that of the eigenvalues overflows.
    return torch.where(both, r, 1.0).sqrt() / torch.where(both, x, 1.0).sqrt()
