"""Adam and AdamW: a running mean of the gradient over the root of a running mean of its square.

Row: (F̂_emp^batch)^½, element, division. Kingma & Ba, arXiv 1412.6980; Loshchilov & Hutter, arXiv
1711.05101. With t counted from 1::

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g²
    d  = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + damping)

Needs the gradient only. Two copies of the parameters; about ten operations an entry.
"""

import math

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg.precision import factor_dtype, wide
from funcprecond.methods.table import Card
from funcprecond.tracing import multi_tensor
from funcprecond.transform import Transform, counter
from funcprecond.transforms.weight_decay import parameters
from funcprecond.tree import Params, state

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
    return _adam(betas, damping, None)


def adamw(
    *,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    damping: float | Tensor = 1e-8,
    decay_rate: float | Tensor = 0.01,
) -> Transform:
    """Adam with decoupled weight decay, ``chain(adam(...), weight_decay(decay_rate))`` in one pass.

    Args:
        betas, damping: as for :func:`adam`.
        decay_rate: as for :func:`funcprecond.weight_decay`.
    """
    return _adam(betas, damping, decay_rate)


def _adam(betas, damping, decay_rate) -> Transform:
    b1, b2 = betas
    numbers = not any(isinstance(x, Tensor) for x in (b1, b2, damping, decay_rate))

    def init(params: Params) -> AdamState:
        def zeros() -> Params:
            return {k: torch.zeros_like(p, dtype=factor_dtype(p)) for k, p in params.items()}

        return AdamState(zeros(), zeros(), counter(params))

    def update(
        state: AdamState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[AdamState, Params]:
        names, step = list(grads), state.step + 1
        m, v = [state.mean[k] for k in names], [state.second_moment[k] for k in names]
        g = [grads[k].to(m_.dtype) for k, m_ in zip(names, m, strict=True)]
        decayed = None if decay_rate is None else parameters(evidence)
        p = [] if decayed is None else [decayed[k] for k in names]
        # Wide, whatever torch's default is: in float32 the first of these is off by 1e-5.
        correct1 = 1 - _power(b1, wide(step))
        correct2 = (1 - _power(b2, wide(step))) ** 0.5
        # The direction is m / (ratio sqrt(v) + shift).
        ratio, shift = correct1 / correct2, correct1 * damping
        if numbers and multi_tensor(g, m, v, p):
            alone = g[0].device.type == "cpu" and not torch.compiler.is_compiling()
            m, v, d = (one_by_one if alone else together)(m, v, g, p, ratio, shift)
        else:
            m = [b1 * m_ + (1 - b1) * g_ for m_, g_ in zip(m, g, strict=True)]
            v = [b2 * v_ + (1 - b2) * g_ * g_ for v_, g_ in zip(v, g, strict=True)]
            d = [m_ / (ratio * v_.sqrt() + shift) for m_, v_ in zip(m, v, strict=True)]
            if p and decay_rate is not None:
                d = [d_ + decay_rate * p_ for d_, p_ in zip(d, p, strict=True)]
        new = AdamState(dict(zip(names, m, strict=True)), dict(zip(names, v, strict=True)), step)
        return new, {k: d_.to(grads[k].dtype) for k, d_ in zip(names, d, strict=True)}

    def together(m, v, g, p, ratio, shift):
        # Three new copies, changed in place from there: half the time.
        m = torch._foreach_lerp(m, g, 1 - b1)
        v = torch._foreach_mul(v, b2)
        torch._foreach_addcmul_(v, g, g, 1 - b2)
        d = torch._foreach_sqrt(v)
        torch._foreach_mul_(d, ratio)
        # With alpha it is a sum with a tensor; without, the host would read the tensor first.
        torch._foreach_add_(d, shift, alpha=1)
        torch._foreach_reciprocal_(d)
        torch._foreach_mul_(d, m)
        if p:
            torch._foreach_add_(d, p, alpha=decay_rate)
        return m, v, d

    def one_by_one(m, v, g, p, ratio, shift):
        # The same where a launch costs nothing: two passes fewer, and a tensor stays in the cache.
        ratio, new_m, new_v, directions = float(ratio), [], [], []
        for i, g_ in enumerate(g):
            new_m.append(torch.lerp(m[i], g_, 1 - b1))
            new_v.append(torch.mul(v[i], b2).addcmul_(g_, g_, value=1 - b2))
            d = torch.sqrt(new_v[i])
            torch.add(shift, d, alpha=ratio, out=d)
            torch.div(new_m[i], d, out=d)
            directions.append(d.add_(p[i], alpha=decay_rate) if p else d)
        return new_m, new_v, directions

    return Transform(init, update)


def _power(beta: float | Tensor, t: Tensor) -> Tensor:
    if isinstance(beta, Tensor):
        return beta**t
    # The compiler takes an exponential once for all parameters, but a power again for every entry.
    return torch.exp(t * (math.log(beta) if beta else -math.inf))


_ROW = ("(F̂_emp^batch)^½", "element", "G direct, division")
CARDS = (
    Card("adam", "Adam (Kingma & Ba 2015)", *_ROW, adam, learning_rate=3e-3, momentum=True),
    Card("adamw", "AdamW (Loshchilov 2019)", *_ROW, adamw, learning_rate=3e-3, momentum=True),
)
