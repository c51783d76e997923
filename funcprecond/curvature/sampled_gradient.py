"""The mini-batch gradient at labels sampled from the model's own prediction.

The outer product of one such gradient with itself is an unbiased estimate of ``c`` times the Fisher
matrix of the batch, for one more pull-back through the shared forward run and no per-example
gradient.
"""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.need import Need
from funcprecond.problems import Problem
from funcprecond.tree import Params, state

__all__ = ["SampledGradient", "SampledGradients"]


@state
class SampledGradients:
    """Gradients whose outer products sum to an estimate of ``c F``.

    Attributes:
        grads: (samples, *shape) for each parameter.
        constant: the loss's reduction constant ``c``, 1 / N for a mean over examples; 0-d.
    """

    grads: Params
    constant: Tensor


@dataclasses.dataclass(frozen=True)
class SampledGradient(Need):
    """Gradients of the loss at sampled labels.

    Attributes:
        labels: sampled from the model's prediction ("mc"), or the data's own ("empirical"): then it
            is the training gradient itself, at no cost.
        samples: how many gradients, with "mc"; each carries ``1 / sqrt(samples)``.
    """

    labels: Literal["mc", "empirical"] = "mc"
    samples: int = 1

    def __post_init__(self):
        if self.labels not in ("mc", "empirical"):
            msg = f"labels must be 'mc' or 'empirical', not {self.labels!r}"
            raise ValueError(msg)
        if self.samples < 1:
            msg = f"samples must be at least 1, not {self.samples}"
            raise ValueError(msg)

    def draw(
        self, problem: Problem, params: Params, batch: Any, generator: torch.Generator | None
    ) -> Any:
        if self.labels == "empirical":
            return ()
        return problem.loss.label_noise(problem.split(batch)[1], self.samples, generator)

    def measure(self, evaluation: Evaluation, noise: Any) -> SampledGradients:
        constant = evaluation.constant
        if self.labels == "empirical":
            rows = [evaluation.grads]
        else:
            cotangents = evaluation.cotangents("mc", noise)
            rows = [evaluation.pull(constant.to(u.dtype) * u) for u in cotangents]
        stacked = {k: torch.stack([row[k] for row in rows]) for k in evaluation.params}
        return SampledGradients(stacked, constant)
