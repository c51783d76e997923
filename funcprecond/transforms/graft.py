"""Grafting: the direction of one method with the length of another's."""

from typing import Any

import torch
from torch import Tensor

from funcprecond.checks import checked
from funcprecond.evidence import Evidence, is_due
from funcprecond.linalg.precision import factor_dtype, wide_dtype
from funcprecond.need import Every, NotDue
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["Grafted", "graft"]

TINY = 1e-30


@state
class Grafted:
    """The state of :func:`graft`.

    Attributes:
        direction: the state of the method that gives the direction.
        magnitude: the state of the method that gives the length.
    """

    direction: Any
    magnitude: Any


@checked
def graft(direction: Transform, magnitude: Transform, *, start: int = 0) -> Transform:
    """Take the direction of each parameter from one method and its length from another.

    For each parameter, ``d <- d * |m| / |d|``, where d and m are the directions of the two methods
    (Anil et al., arXiv 2002.09018). A learning rate tuned for ``magnitude`` then carries over, and
    the scale of ``direction`` does not matter. Where d is zero, the result is zero.

    Args:
        direction, magnitude: the two methods. Both receive every gradient from the first step on.
        start: before this step the result is the direction of ``magnitude``, while the statistics
            of ``direction`` accumulate.

    Returns:
        A transform with the needs of both methods; its state is a :class:`Grafted`.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt = fp.graft(fp.adagrad(), fp.sgd())
        >>> grads = {"w": torch.tensor([3.0, 4.0])}
        >>> state, direction = opt.update(opt.init(grads), grads)
        >>> torch.allclose(direction["w"], torch.full((2,), 12.5**0.5))
        True
    """
    begun = Every(f"graft from step {start}")

    def init(params: Params) -> Grafted:
        return Grafted(direction.init(params), magnitude.init(params))

    def update(
        state: Grafted, grads: Params, evidence: Evidence | None = None
    ) -> tuple[Grafted, Params]:
        first, d = direction.update(state.direction, grads, evidence)
        second, m = magnitude.update(state.magnitude, grads, evidence)
        if start and not is_due(begun, evidence):
            return Grafted(first, second), m
        grafted = {
            k: (x * (_norm(m[k]) / _norm(x).clamp_min(TINY))).to(x.dtype) for k, x in d.items()
        }
        return Grafted(first, second), grafted

    def needs(t: int) -> tuple:
        mark = begun if t >= start else NotDue(begun)
        marks = (mark,) if start else ()
        return tuple(dict.fromkeys((*marks, *direction.needs(t), *magnitude.needs(t))))

    return Transform(init, update, needs)


def _norm(x: Tensor) -> Tensor:
    # In float32 the squares of a vanishing direction underflow, and the quotient would explode.
    return torch.linalg.vector_norm(x, dtype=wide_dtype(x)).to(factor_dtype(x))
