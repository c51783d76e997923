"""The random numbers of a sketch, which selects a few columns of a long matrix."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.linalg import random
from funcprecond.need import Need
from funcprecond.problems import Problem
from funcprecond.tree import Params

__all__ = ["Sketch"]


@dataclasses.dataclass(frozen=True)
class Sketch(Need):
    """Uniform numbers for the choice of ``size`` columns on both sides of each layer's matrix.

    The measured value is a tensor (2, size). All layers share it. Nothing is drawn for parameters
    so small that no side has more than ``size`` columns, and the value is then ``()``.

    Attributes:
        size: the number of columns.
    """

    size: int
    differentiates: ClassVar[bool] = False
    gives: ClassVar[type] = Tensor

    def draw(
        self, problem: Problem, params: Params, batch: Any, generator: torch.Generator | None
    ) -> Any:
        # One more column may belong to a bias.
        sides = [max(n, p.numel() // max(n, 1) + 1) for p in params.values() for n in p.shape[:1]]
        if max(sides, default=0) <= self.size:
            return ()
        device = next(iter(params.values())).device
        return random.uniform((2, self.size), generator, dtype=torch.float32, device=device)

    def measure(self, evaluation: Evaluation, noise: Any) -> Any:
        return noise
