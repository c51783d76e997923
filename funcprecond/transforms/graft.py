"""Grafting: the direction of one method with the length of another's."""

from typing import Any

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg.precision import factor_dtype
from funcprecond.need import Every
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["Grafted", "graft"]

TINY = 1e-30


@state
class Grafted:
    """The states of the two methods."""

    direction: Any
    magnitude: Any


def graft(direction: Transform, magnitude: Transform, *, start: int = 0) -> Transform:
    """Take each parameter's direction from one method and its length from another.

    ``d <- d * |m| / |d|`` per parameter, so that a learning rate tuned for ``magnitude`` carries
    over and every global scale of ``direction`` is irrelevant (Anil et al., arXiv 2002.09018).
    Where the direction is zero the result is zero.

    Args:
        direction, magnitude: the two methods; both see every gradient from the first step on.
        start: until this step the direction is ``magnitude``'s as well, while the statistics of
            ``direction`` fill.
    """
    begun = Every(f"graft from step {start}")

    def init(params: Params) -> Grafted:
        return Grafted(direction.init(params), magnitude.init(params))

    def update(
        state: Grafted, grads: Params, evidence: Evidence | None = None
    ) -> tuple[Grafted, Params]:
        first, d = direction.update(state.direction, grads, evidence)
        second, m = magnitude.update(state.magnitude, grads, evidence)
        if start and evidence is not None and begun not in evidence:
            return Grafted(first, second), m
        grafted = {
            k: (x * (_norm(m[k]) / _norm(x).clamp_min(TINY))).to(x.dtype) for k, x in d.items()
        }
        return Grafted(first, second), grafted

    def needs(t: int) -> tuple:
        marks = (begun,) if start and t >= start else ()
        return tuple(dict.fromkeys((*marks, *direction.needs(t), *magnitude.needs(t))))

    return Transform(init, update, needs)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=factor_dtype(x))
