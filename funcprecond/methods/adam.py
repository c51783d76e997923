"""Adam and AdamW: a running mean of the gradient over the root of a running mean of its square.

Row: (F̂_emp^batch)^½, element, division. Kingma & Ba, arXiv 1412.6980; Loshchilov & Hutter, arXiv
1711.05101. With t counted from 1::

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g²
    d  = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + damping)

Needs the gradient only. Two copies of the parameters; about ten operations an entry.
"""

import torch
from torch import Tensor

from funcprecond.problem import Params
from funcprecond.representation.diagonal import factor_dtype
from funcprecond.taxonomy import Card
from funcprecond.transform import Transform, chain, counter, gradient_only
from funcprecond.transforms.weight_decay import weight_decay
from funcprecond.tree import state

__all__ = ["AdamState", "adam", "adamw"]


@state
class AdamState:
    """The two running means, shaped like the parameters in float32 or wider, and the step."""

    mean: Params
    second_moment: Params
    step: Tensor


def adam(
    *,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    damping: float | Tensor = 1e-8,
) -> Transform:
    """Adam's direction.

    Args:
        betas: the weights of the old mean and of the old second moment.
        damping: added to the bias-corrected root, as in the paper and in ``torch.optim``.
    """
    b1, b2 = betas

    def init(params: Params) -> AdamState:
        def zeros() -> Params:
            return {k: torch.zeros_like(p, dtype=factor_dtype(p)) for k, p in params.items()}

        return AdamState(zeros(), zeros(), counter(params))

    def update(state: AdamState, grads: Params) -> tuple[AdamState, Params]:
        step = state.step + 1
        names = list(grads)
        g = [grads[k].to(state.mean[k].dtype) for k in names]
        m, v = [state.mean[k] for k in names], [state.second_moment[k] for k in names]
        m = [b1 * m_ + (1 - b1) * g_ for m_, g_ in zip(m, g, strict=True)]
        v = [b2 * v_ + (1 - b2) * g_ * g_ for v_, g_ in zip(v, g, strict=True)]
        # In float64 whatever torch's default is: in float32 the first of these is off by 1e-5.
        t = step.double()
        correct1, correct2 = 1 - b1**t, (1 - b2**t) ** 0.5
        direction = {
            k: ((m_ / correct1) / (v_.sqrt() / correct2 + damping)).to(grads[k].dtype)
            for k, m_, v_ in zip(names, m, v, strict=True)
        }
        new = AdamState(dict(zip(names, m, strict=True)), dict(zip(names, v, strict=True)), step)
        return new, direction

    return gradient_only(init, update)


def adamw(
    *,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    damping: float | Tensor = 1e-8,
    decay_rate: float | Tensor = 0.01,
) -> Transform:
    """Adam with decoupled weight decay: ``chain(adam(...), weight_decay(decay_rate))``."""
    return chain(adam(betas=betas, damping=damping), weight_decay(decay_rate))


_ROW = ("(F̂_emp^batch)^½", "element", "G direct, division")
CARDS = (
    Card("adam", "Adam (Kingma & Ba 2015)", *_ROW, adam, learning_rate=3e-3, momentum=True),
    Card("adamw", "AdamW (Loshchilov 2019)", *_ROW, adamw, learning_rate=3e-3, momentum=True),
)
