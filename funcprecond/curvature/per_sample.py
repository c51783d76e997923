"""Per-example gradients, and the empirical Fisher matrix that they are rows of."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from funcprecond.evaluation import Evaluation
from funcprecond.observe import Need, observe
from funcprecond.problem import Params, Problem
from funcprecond.representation.diagonal import factor_dtype
from funcprecond.tree import state

__all__ = ["PerSample", "PerSampleGrads", "per_sample_grads"]


@state
class PerSample:
    """Gradients of the single examples' losses.

    Attributes:
        grads: (N, *shape) for each parameter: the gradient of the sum of the example's terms.
        scale: ``c``, by which their sum is multiplied to give the loss's gradient, a 0-d tensor.
    """

    grads: Params
    scale: Tensor

    def diagonal(self) -> Params:
        """The diagonal of the empirical Fisher matrix ``c sum_n g_n g_n^T``."""
        # In float32 or wider: the squares of half-precision gradients vanish.
        return {
            k: self.scale * torch.linalg.vector_norm(g, dim=0, dtype=factor_dtype(g)).square()
            for k, g in self.grads.items()
        }


@dataclasses.dataclass(frozen=True)
class PerSampleGrads(Need):
    """The gradient of each example, by ``vmap``.

    Attributes:
        chunk_size: examples at a time, or None for all at once. The result, N times the parameters,
            is in memory either way.
    """

    chunk_size: int | None = None

    def measure(self, evaluation: Evaluation, noise: Any) -> PerSample:
        loss = evaluation.problem.loss
        cotangents = loss.empirical(evaluation.outputs, evaluation.targets)
        names = list(evaluation.params)
        return PerSample(
            evaluation.pull_each(cotangents, names, self.chunk_size), evaluation.constant
        )


def per_sample_grads(
    problem: Problem,
    params: Params,
    batch: Any,
    *,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Params:
    """The gradient of each example's loss: (N, *shape) for each parameter.

    Their sum, times the loss's reduction constant (1 / N for a mean over examples), is the
    gradient.

    Raises:
        ValueError: the model couples the examples of a batch (BatchNorm in training mode).
    """
    need = PerSampleGrads(chunk_size)
    return observe(problem, params, batch, (need,), generator=generator)[need].grads
