"""Clipping by the global norm."""

from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.transform import Transform, stateless
from funcprecond.tree import Params

__all__ = ["clip_norm"]


def clip_norm(limit: float | Tensor) -> Transform:
    """Shrink the direction so that its norm over all parameters is at most ``limit``.

    First in a chain it clips the gradient, after the preconditioner the step. A direction that is
    not finite stays so: see :func:`funcprecond.skip_nonfinite`.
    """

    def clip(grads: Params) -> Params:
        factor = (limit / treemath.norm(grads).clamp_min(1e-30)).clamp_max(1.0)
        return {k: g * factor.to(g.dtype) for k, g in grads.items()}

    return stateless(clip)
