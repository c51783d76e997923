"""Adam's arithmetic in few passes over memory, for eager code: two ways to the same result."""

import torch
from torch import Tensor

from funcprecond.linalg.differentiable import power
from funcprecond.tracing import multi_tensor

__all__ = ["one_by_one", "quotient", "together"]

Tensors = list[Tensor]


def together(
    m: Tensors,
    v: Tensors,
    g: Tensors,
    p: Tensors,
    b1: float,
    b2: float,
    ratio: Tensor,
    shift: Tensor,
    weight_decay: float | None,
) -> tuple[Tensors, Tensors, Tensors]:
    """New means, new second moments and ``m / (ratio sqrt(v) + shift) + weight_decay p``.

    This way uses torch's multi-tensor operations, for devices where the launch of an operation
    dominates the cost.

    Args:
        m, v, g: the old means, the old second moments, and the gradients.
        p: the parameters; an empty list means no weight decay.
        b1, b2: the weights of the old means and of the old second moments.
        ratio, shift: 0-d tensors.
        weight_decay: the coefficient of ``p``; None without ``p``.
    """
    # The first operation on each result makes a new tensor, which the next ones change in place.
    m = list(torch._foreach_lerp(m, g, 1 - b1))
    v = list(torch._foreach_mul(v, b2))
    torch._foreach_addcmul_(v, g, g, 1 - b2)
    d = list(torch._foreach_sqrt(v))
    torch._foreach_mul_(d, ratio)
    # Without alpha, torch would read the 0-d tensor back to the host.
    torch._foreach_add_(d, shift, alpha=1)
    torch._foreach_reciprocal_(d)
    torch._foreach_mul_(d, m)
    if p and weight_decay is not None:
        if torch.compiler.is_compiling():
            # Where p is a matrix product, torch's compiler fuses the sum into it and loses alpha.
            torch._foreach_add_(d, torch._foreach_mul(p, weight_decay))
        else:
            torch._foreach_add_(d, p, alpha=weight_decay)
    return m, v, d


def one_by_one(
    m: Tensors,
    v: Tensors,
    g: Tensors,
    p: Tensors,
    b1: float,
    b2: float,
    ratio: Tensor,
    shift: Tensor,
    weight_decay: float | None,
) -> tuple[Tensors, Tensors, Tensors]:
    """The result of :func:`together`, for devices where the launch of an operation costs nothing.

    This way takes two fewer passes over memory, and each tensor stays in the cache.
    """
    factor, new_m, new_v, directions = float(ratio), [], [], []
    for i, g_ in enumerate(g):
        new_m.append(torch.lerp(m[i], g_, 1 - b1))
        new_v.append(torch.mul(v[i], b2).addcmul_(g_, g_, value=1 - b2))
        d = torch.sqrt(new_v[i])
        torch.add(shift, d, alpha=factor, out=d)
        torch.div(new_m[i], d, out=d)
        directions.append(d.add_(p[i], alpha=weight_decay) if p else d)  # pyright: ignore
    return new_m, new_v, directions


def quotient(m: Tensor, v: Tensor, damping: float | Tensor, factor: Tensor) -> Tensor:
    """``m / (sqrt(v) + damping) * factor``, with a 0-d ``factor``."""
    if isinstance(damping, Tensor) or not multi_tensor((m, v, factor)):
        return m / (power(v, 0.5) + damping) * factor
    d = v.sqrt()
    return torch.div(m, d.add_(damping), out=d).mul_(factor)
