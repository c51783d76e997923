"""A trust region in the curvature's own length: the KL clip."""

from typing import Any

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg import treemath
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["KLClipped", "kl_clip"]


@state
class KLClipped:
    """The method's state, and ν of the last step, 0-d: 1 where nothing was clipped."""

    inner: Any
    factor: Tensor


def kl_clip(inner: Transform, *, rate: float | Tensor, bound: float | Tensor = 1e-3) -> Transform:
    """Shrink a preconditioned direction so that the step changes the model by a bounded divergence.

    ``d <- ν d`` with ``ν = min(1, sqrt(κ / (η² <d, g>)))`` over all parameters, for g the gradient
    that ``inner`` preconditions and η the learning rate (Ba, Grosse & Martens, 2017). With
    ``d = C^-1 g`` and C the Fisher matrix, ``η² <d, g> / 2`` is the KL divergence between the
    model before and after the step, to second order; clipped, it is at most ``κ / 2``. Where
    ``<d, g>`` is not positive, as it can be if C comes from other batches, nothing is clipped.

    Args:
        inner: a preconditioner, such as ``fp.kfac()``; what follows it, such as momentum, comes
            after the clip.
        rate: η, the learning rate of the chain.
        bound: κ.
    """

    def init(params: Params) -> KLClipped:
        return KLClipped(inner.init(params), treemath.scalar_like(params, 1.0))

    def update(
        state: KLClipped, grads: Params, evidence: Evidence | None = None
    ) -> tuple[KLClipped, Params]:
        new, direction = inner.update(state.inner, grads, evidence)
        length = (rate**2 * treemath.dot(direction, grads)).to(state.factor.dtype)
        clips = length > bound
        factor = torch.where(clips, (bound / torch.where(clips, length, 1)).sqrt(), 1)
        return KLClipped(new, factor), {k: d * factor.to(d.dtype) for k, d in direction.items()}

    return Transform(init, update, inner.needs)
