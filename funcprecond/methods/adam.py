"""Adam and AdamW: the running mean of the gradient over the root of that of its square."""

import math

import torch
from torch import Tensor

from funcprecond.evidence import Evidence, required
from funcprecond.linalg import adam_step, treemath
from funcprecond.linalg.differentiable import power
from funcprecond.linalg.precision import wide
from funcprecond.methods.card import card
from funcprecond.tracing import multi_tensor
from funcprecond.transform import Transform, counter, fitted
from funcprecond.tree import Params, state

__all__ = ["AdamState", "adam", "adamw"]


@state
class AdamState:
    """The state of Adam.

    Attributes:
        mean, second_moment: m and v, shaped like the parameters, in float32 or wider.
        step: the number of updates, a 0-d integer tensor.
    """

    mean: Params
    second_moment: Params
    step: Tensor


@card(
    "Adam (Kingma & Ba 2015)",
    curvature="(F̂_emp^batch)^½",
    representation="element",
    solver="G direct, division",
    learning_rate=3e-3,
    carries_momentum=True,
)
def adam(
    *,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    damping: float | Tensor = 1e-8,
) -> Transform:
    """Adam (Kingma & Ba, arXiv 1412.6980).

    All operations are element-wise, and t counts from 1::

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g²
        d  = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + damping)

    Args:
        betas: (b1, b2), the weights of the old mean and of the old second moment.
        damping: added to the bias-corrected root, as in the paper and in ``torch.optim.Adam``.

    Returns:
        A method that needs the gradient only. Its state is two copies of the parameters.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt, grads = fp.adam(damping=0.0), {"w": torch.tensor([3.0, -4.0])}
        >>> state, direction = opt.update(opt.init(grads), grads)
        >>> torch.allclose(direction["w"], torch.tensor([1.0, -1.0]))
        True
    """
    return _adam(betas, damping, None)


@card(
    "AdamW (Loshchilov 2019)",
    curvature="(F̂_emp^batch)^½",
    representation="element",
    solver="G direct, division",
    learning_rate=3e-3,
    carries_momentum=True,
)
def adamw(
    *,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    damping: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.01,
) -> Transform:
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101).

    With d the direction of Adam::

        d_W = d + weight_decay θ

    It is ``fp.chain(fp.adam(...), fp.weight_decay(...))`` in one pass over memory. The learning
    rate multiplies both terms, as in ``torch.optim.AdamW``.

    Args:
        betas, damping: see :func:`funcprecond.adam`.
        weight_decay: the coefficient of the parameters in the direction.

    Returns:
        A method that needs the parameters, which are part of the evidence, in addition to the
        gradient. Its state is two copies of the parameters.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.adamw(weight_decay=0.1), fp.scale(1e-3))
    """
    return _adam(betas, damping, weight_decay)


def _adam(betas, damping, weight_decay) -> Transform:
    b1, b2 = betas
    numbers = not any(isinstance(x, Tensor) for x in (b1, b2, damping, weight_decay))

    def init(params: Params) -> AdamState:
        m, v = treemath.zeros_like(params), treemath.zeros_like(params)
        return AdamState(m, v, counter(params))

    def update(
        state: AdamState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[AdamState, Params]:
        names, step = list(grads), state.step + 1
        m, v = [state.mean[k] for k in names], [state.second_moment[k] for k in names]
        g = [grads[k].to(m_.dtype) for k, m_ in zip(names, m, strict=True)]
        decayed = None if weight_decay is None else required(evidence).params
        p = [] if decayed is None else [decayed[k] for k in names]
        # In float64, because in float32 the first correction would be off by 1e-5.
        correct1 = 1 - _power(b1, wide(step))
        correct2 = (1 - _power(b2, wide(step))) ** 0.5
        # The direction is m / (ratio sqrt(v) + shift).
        ratio, shift = correct1 / correct2, correct1 * damping
        if numbers and multi_tensor(g, m, v, p):
            alone = g[0].device.type == "cpu" and not torch.compiler.is_compiling()
            run = adam_step.one_by_one if alone else adam_step.together
            m, v, d = run(m, v, g, p, b1, b2, ratio, shift, weight_decay)
        else:
            m = [b1 * m_ + (1 - b1) * g_ for m_, g_ in zip(m, g, strict=True)]
            v = [b2 * v_ + (1 - b2) * g_ * g_ for v_, g_ in zip(v, g, strict=True)]
            d = [m_ / (ratio * power(v_, 0.5) + shift) for m_, v_ in zip(m, v, strict=True)]
            if p and weight_decay is not None:
                d = [d_ + weight_decay * p_ for d_, p_ in zip(d, p, strict=True)]
        new = AdamState(dict(zip(names, m, strict=True)), dict(zip(names, v, strict=True)), step)
        return new, {k: d_.to(grads[k].dtype) for k, d_ in zip(names, d, strict=True)}

    return fitted(Transform(init, update), lambda state: state.mean)


def _power(beta: float | Tensor, t: Tensor) -> Tensor:
    if isinstance(beta, Tensor):
        return beta**t
    # A compiler computes an exponential once for all parameters, but a power for every entry.
    return torch.exp(t * (math.log(beta) if beta else -math.inf))
