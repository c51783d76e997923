"""The mini-batch gradient at labels that are sampled from the model's own prediction.

The outer product of one such gradient with itself is an unbiased estimate of c times the Fisher
matrix of the batch, where c is the reduction constant of the loss (``1 / N`` for a mean over N
examples). It costs one more pull-back through the shared forward run, and no per-sample gradient.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import torch

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.checks import at_least, one_of
from funcprecond.need import Need
from funcprecond.problems import Problem
from funcprecond.tree import Params, state

__all__ = ["SampledGradient", "SampledGradients"]


@state
class SampledGradients:
    """Gradients whose outer products sum to an estimate of a Fisher matrix.

    Attributes:
        grads: (samples, *shape) for each parameter.
    """

    grads: Params


@dataclasses.dataclass(frozen=True)
class SampledGradient(Need):
    """Gradients of the loss at sampled labels.

    The measured value is a :class:`SampledGradients`. Costs one pull-back per gradient.

    Attributes:
        labels: "mc" samples the labels from the model's prediction. "empirical" takes the labels of
            the data, so that the value is the training gradient itself, at no cost.
        samples: the number of gradients with "mc". Each is multiplied by ``1 / sqrt(samples)``, so
            that the sum of the outer products is a mean.
        per_sample: divide by the root of the reduction constant c of the loss, so that the outer
            products estimate the Fisher matrix F. By default they estimate c F, which is the
            covariance of the mini-batch gradient.

    Raises:
        ValueError: ``labels`` or ``samples`` is not allowed.
    """

    labels: Literal["mc", "empirical"] = "mc"
    samples: int = 1
    per_sample: bool = False
    gives: ClassVar[type] = SampledGradients

    def __post_init__(self):
        one_of(("mc", "empirical"), labels=self.labels)
        at_least(1, samples=self.samples)

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
            rows = [evaluation.pull((constant * u).to(u.dtype)) for u in cotangents]
        stacked = {k: torch.stack([row[k] for row in rows]) for k in evaluation.params}
        if self.per_sample:
            stacked = {k: (g * constant.rsqrt()).to(g.dtype) for k, g in stacked.items()}
        return SampledGradients(stacked)
