"""A damped inverse along each axis of a parameter, by Cholesky decompositions."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg.axes import multiply
from funcprecond.linalg.batching import by_shape
from funcprecond.linalg.differentiable import cholesky_inverse
from funcprecond.linalg.precision import factor_dtype
from funcprecond.need import Need
from funcprecond.representation.tensor_normal import Factors, TensorNormal, long_axes
from funcprecond.tree import Params

__all__ = ["AxisInverse"]


@dataclasses.dataclass(frozen=True)
class AxisInverse:
    """``g ×_1 (U_1 + λ I)^(-1) ×_2 … ×_k (U_k + λ I)^(-1)``.

    Attributes:
        damping: λ, which is added to every U_i, in units of the k-th root of the curvature.
    """

    damping: float | Tensor = 0.1
    accepts: ClassVar[tuple[type, ...]] = (TensorNormal,)
    needs: ClassVar[tuple[Need, ...]] = ()
    staggers: ClassVar[bool] = False

    def init(self, representation: TensorNormal) -> Factors:
        """An identity matrix for each axis.

        Args:
            representation: the representation before the first measurement.

        Returns:
            The factor.
        """
        return {
            k: tuple(torch.eye(len(x), dtype=x.dtype, device=x.device) for x in factors)
            for k, factors in representation.average.total.items()
        }

    def prepare(self, representation: TensorNormal, previous: Factors) -> Factors:
        """Invert the damped factors.

        Args:
            representation: the curvature.
            previous: the old inverses, which are kept for factors that are zero or not finite.

        Returns:
            The inverses. Costs one batched Cholesky decomposition per size of factor.
        """

        def invert(u: Tensor, old: Tensor, _) -> Tensor:
            eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
            # A factor that is zero or not finite keeps its old inverse.
            seen = u.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
            ok = (torch.isfinite(u).all(-1).all(-1) & seen)[..., None, None]
            symmetric = (u + u.mT) / 2 + (self.damping * eye).to(u.dtype)
            factor, info = torch.linalg.cholesky_ex(torch.where(ok, symmetric, eye))
            ok = ok & (info == 0)[..., None, None]
            inverse = cholesky_inverse(torch.where(ok, factor, eye))
            return torch.where(ok, inverse, old).contiguous()

        factors = representation.factors()
        flat = [u for of_param in factors.values() for u in of_param]
        old = [x for of_param in previous.values() for x in of_param]
        found = iter(by_shape(invert, flat, old, static=[None] * len(flat)))
        return {k: tuple(next(found) for _ in of_param) for k, of_param in factors.items()}

    def apply(self, factor: Factors, grads: Params, evidence: Evidence | None = None) -> Params:
        """Multiply the gradient by the inverses.

        Args:
            factor: the inverses.
            grads: the gradient.
            evidence: not used.

        Returns:
            The direction. Costs one product per axis.
        """
        direction = {}
        for name, g in grads.items():
            x = g.to(factor_dtype(g)).reshape(long_axes(g.shape))
            x = multiply(factor[name], x, range(x.ndim))
            direction[name] = x.reshape(g.shape).to(g.dtype)
        return direction
