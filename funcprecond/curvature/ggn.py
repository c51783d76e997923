"""The Gauss-Newton matrix ``J^T H_L J``; for a likelihood it is the Fisher matrix."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.jacobian import linearise
from funcprecond.need import Need
from funcprecond.problems import Problem
from funcprecond.tree import Buffers, Params

__all__ = ["GGNOperator", "ggn_mv"]


def ggn_mv(
    problem: Problem,
    params: Params,
    batch: Any,
    vector: Params,
    *,
    buffers: Buffers | None = None,
    generator: torch.Generator | None = None,
) -> Params:
    """The Gauss-Newton matrix of the problem's loss on ``batch`` times ``vector``.

    The loss's Hessian in the outputs is in closed form for the losses of :mod:`funcprecond.losses`
    and by autodiff for any other. Costs about 1.7 gradients; for many products at one point open
    :func:`funcprecond.linearise`, or make a :class:`funcprecond.GGN`.
    """
    opened = linearise(problem, params, batch, buffers=buffers, generator=generator)
    return opened.ggn_mv(vector, keep=False)


@dataclasses.dataclass(frozen=True)
class GGNOperator(Need):
    """The function ``vector -> G vector`` on this batch. It lives for one step."""

    twice: ClassVar[bool] = True

    def measure(self, evaluation: Evaluation, noise: Any) -> Callable[[Params], Params]:
        return evaluation.ggn_mv
