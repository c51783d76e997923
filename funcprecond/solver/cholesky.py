"""Kronecker-factored curvature with damping split between the factors, by Cholesky inverses."""

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from funcprecond.problem import Params
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.solver.inverse_root import by_shape
from funcprecond.solver.layerwise import apply_blocks, unit_inverses
from funcprecond.tree import state

__all__ = ["Cholesky", "CholeskyFactor", "damped_inverse", "pi"]


@state
class CholeskyFactor:
    """Inverses of both damped factors of each block, of the norm layers' units, and the rest."""

    left: dict[str, Tensor]
    right: dict[str, Tensor]
    units: dict[str, Tensor]
    others: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Cholesky:
    r"""``(left + √λ/π I)^-1 G (right + √λ π I)^-1``: Martens & Grosse's factored damping.

    It is stronger than the exact damping of the same λ by the cross terms ``√λ π (left ⊗ I) +
    √λ/π (I ⊗ right)``, so that values do not carry over from :class:`funcprecond.solver.eigen.Eigen`.

    Attributes:
        damping: λ, in the loss's units.
        split: "pi" chooses π² as the ratio of the factors' mean eigenvalues, which makes the cross terms'
            trace least and the result blind to how scale is shared between the factors; "equal" is π = 1.
    """

    damping: float | Tensor = 1e-3
    split: Literal["pi", "equal"] = "pi"
    accepts: ClassVar[tuple[type, ...]] = (KroneckerIO,)

    def init(self, representation: KroneckerIO) -> CholeskyFactor:
        """Empty, as the representation is."""
        return CholeskyFactor({}, {}, {}, {})

    def prepare(self, representation: KroneckerIO, previous: CholeskyFactor) -> CholeskyFactor:
        """Invert: one batched Cholesky decomposition for each size of factor."""
        w = representation.weight
        gamma = self.damping**0.5
        blocks = list(representation.left)
        left = [representation.left[k] / w for k in blocks]
        right = [representation.right[k] / w for k in blocks]
        ratio = [
            pi(r, x) if self.split == "pi" else torch.ones_like(w)
            for x, r in zip(left, right, strict=True)
        ]
        damped = [(x, gamma / p) for x, p in zip(left, ratio, strict=True)]
        damped += [(x, gamma * p) for x, p in zip(right, ratio, strict=True)]
        inverses = by_shape(
            lambda x, r, _: damped_inverse(x, r),
            [x for x, _ in damped],
            [r for _, r in damped],
            static=[None] * len(damped),
        )
        return CholeskyFactor(
            dict(zip(blocks, inverses[: len(blocks)], strict=True)),
            dict(zip(blocks, inverses[len(blocks) :], strict=True)),
            unit_inverses({k: x / w for k, x in representation.units.items()}, self.damping),
            {k: x / w for k, x in representation.others.items()},
        )

    def apply(self, factor: CholeskyFactor, grads: Params) -> Params:
        """Two products a layer."""

        def solve(block: str, matrix: Tensor) -> Tensor:
            left, right = factor.left[block], factor.right[block]
            matrix = matrix.to(right.dtype)
            if left.ndim == 1:
                return (left.unsqueeze(-1) * matrix) @ right
            return left @ matrix @ right

        return apply_blocks(
            grads,
            factor.left,
            solve,
            lambda block: factor.right[block].shape[0] if factor.right[block].ndim == 3 else 1,
            factor.units,
            factor.others,
            self.damping,
        )


def pi(right: Tensor, left: Tensor) -> Tensor:
    """``sqrt(mean eigenvalue of right / of left)``, or 1 where either is zero; one for each group."""
    r, x = _mean_eigenvalue(right), _mean_eigenvalue(left)
    both = (r > 0) & (x > 0)
    return torch.where(both, (r / torch.where(both, x, 1.0)).sqrt(), 1.0)


def damped_inverse(matrix: Tensor, ridge: Tensor) -> Tensor:
    """``(matrix + ridge I)^-1``, symmetric; of a diagonal given as a vector, the diagonal.

    The ridge is raised to what rounding needs for the decomposition to exist.
    """
    if matrix.ndim == ridge.ndim + 1:
        return 1 / (matrix + ridge.unsqueeze(-1))
    n = matrix.shape[-1]
    floor = n * torch.finfo(matrix.dtype).eps * _mean_eigenvalue(matrix)
    ridge = torch.maximum(ridge, floor)[..., None, None]
    eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    factor, _ = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2 + ridge * eye)
    return torch.cholesky_inverse(factor)


def _mean_eigenvalue(matrix: Tensor) -> Tensor:
    if matrix.ndim == 1:
        return matrix.mean()
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1) / matrix.shape[-1]
