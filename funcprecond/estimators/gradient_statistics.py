"""Norms and inner products of the gradients of single examples, without forming those.

In an affine layer the gradient of example n is ``Σ_t g_nt a_nt^T`` over its positions t, so that
both follow from the layer's inputs and output gradients.
"""

from typing import Any

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.examples import refuse_coupling
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.problems import Problem
from funcprecond.representation.gram import Gram
from funcprecond.tree import Params

__all__ = ["PER_SAMPLE", "per_sample_gram", "per_sample_norms"]

PER_SAMPLE = LayerStatistics("empirical", others="rows", per_sample=True)
"""The gradient of each example, from the layers, or as rows where no layer covers a parameter."""


def per_sample_gram(
    problem: Problem,
    params: Params,
    batch: Any,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The inner products of the gradients of single examples.

    Args:
        problem, params, batch: whose gradients, and where; those of :func:`per_sample_grads`.
        generator: draws dropout masks.

    Returns:
        (N, N), entry (n, m) is ``g_n · g_m``. Costs two thirds of a gradient, and for each layer the
        smaller of two products, of positions or of rows. Parameters in no layer have their rows
        formed.

    Raises:
        ValueError: the model couples the examples of a batch (BatchNorm in training mode).

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.rand(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> fp.per_sample_gram(problem, problem.params, batch).shape
        torch.Size([8, 8])
    """
    gram, constant = _rows(problem, params, batch, generator)
    # U U^T of the empirical Fisher matrix is c times the examples' inner products.
    return gram.gram() / constant


def per_sample_norms(
    problem: Problem,
    params: Params,
    batch: Any,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The Euclidean norms of the gradients of single examples.

    Args:
        problem, params, batch: whose gradients, and where; those of :func:`per_sample_grads`.
        generator: draws dropout masks.

    Returns:
        (N,). Costs about as much as :func:`per_sample_gram`, and no (N, N) matrix.

    Raises:
        ValueError: the model couples the examples of a batch (BatchNorm in training mode).

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.rand(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> fp.per_sample_norms(problem, problem.params, batch).shape
        torch.Size([8])
    """
    gram, constant = _rows(problem, params, batch, generator)
    return (gram.squared_norms() / constant).clamp_min(0).sqrt()


def _rows(problem, params, batch, generator) -> tuple[Gram, Tensor]:
    refuse_coupling(problem)
    evaluation = Evaluation(problem, params, batch, generator=generator, layers=True)
    (layers,) = PER_SAMPLE.each(evaluation, ())
    return Gram.from_layers(layers, params), layers.scale
