"""Clipping by the global norm."""

from torch import Tensor

from funcprecond.checks import checked
from funcprecond.linalg import treemath
from funcprecond.transform import Transform, stateless
from funcprecond.tree import Params

__all__ = ["clip_norm"]


@checked
def clip_norm(limit: float | Tensor) -> Transform:
    """Shrink the direction so that its Euclidean norm over all parameters is at most ``limit``.

    At the start of a chain it clips the gradient, after the preconditioner it clips the step. A
    direction that is not finite stays so; see :func:`funcprecond.skip_nonfinite`.

    Args:
        limit: the largest norm.

    Returns:
        A transform without state.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt, grads = fp.clip_norm(1.0), {"w": torch.tensor([3.0, 4.0])}
        >>> state, direction = opt.update(opt.init(grads), grads)
        >>> torch.allclose(direction["w"], torch.tensor([0.6, 0.8]))
        True
    """

    def clip(grads: Params) -> Params:
        factor = (limit / treemath.norm(grads).clamp_min(1e-30)).clamp_max(1.0)
        return {k: g * factor.to(g.dtype) for k, g in grads.items()}

    return stateless(clip)
