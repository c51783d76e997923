"""The KL clip: a bound on the length of a step in the metric of the curvature."""

from typing import Any

import torch
from torch import Tensor

from funcprecond.checks import checked
from funcprecond.evidence import Evidence
from funcprecond.linalg import treemath
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["KLClipped", "kl_clip"]


@state
class KLClipped:
    """The state of :func:`kl_clip`.

    Attributes:
        inner: the state of the method.
        factor: ν of the last step, 0-d; it is 1 if the step was not clipped.
    """

    inner: Any
    factor: Tensor


@checked
def kl_clip(inner: Transform, *, rate: float | Tensor, bound: float | Tensor = 1e-3) -> Transform:
    """Shrink a preconditioned direction so that a step changes the model by a bounded divergence.

    With the gradient g, the direction d of ``inner``, the learning rate η and the bound κ (Ba,
    Grosse & Martens, 2017)::

        ν = min(1, sqrt(κ / (η² <d, g>)))          <d, g> over all parameters
        d <- ν d

    If ``d = C^-1 g`` and C is the Fisher matrix, ``η² <d, g> / 2`` is the KL divergence between the
    models before and after the step, to second order. The clip bounds it by ``κ / 2``. Nothing is
    clipped if ``<d, g>`` is not positive, which is possible if C comes from other batches.

    Args:
        inner: a preconditioner, such as ``fp.kfac()``. Transforms that follow it, such as momentum,
            come after the clip.
        rate: η, the learning rate of the chain.
        bound: κ.

    Returns:
        A transform with the needs of ``inner``; its state is a :class:`KLClipped`. Costs one inner
        product over the parameters.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt = fp.kl_clip(fp.sgd(), rate=1.0, bound=1.0)
        >>> grads = {"w": torch.tensor([3.0, 4.0])}
        >>> state, direction = opt.update(opt.init(grads), grads)
        >>> torch.allclose(direction["w"], grads["w"] / 5)
        True
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
