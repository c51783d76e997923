"""Norms and inner products of per-sample gradients, without forming these gradients.

The per-sample gradient of example n in an affine layer is ``Σ_t g_nt a_nt^T`` over its positions t,
so norms and inner products follow from the layer's inputs a and output gradients g.
"""

from typing import Any

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.layer_statistics import ExampleRows
from funcprecond.problems import Problem
from funcprecond.representation.gram import Gram
from funcprecond.tree import Params

__all__ = ["PER_SAMPLE", "per_sample_gram", "per_sample_norms"]

PER_SAMPLE = ExampleRows("empirical")
"""The per-sample gradients: as factors in the layers, and formed for all other parameters."""


def per_sample_gram(
    problem: Problem,
    params: Params,
    batch: Any,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The inner products of the per-sample gradients of a batch.

    Args:
        problem, params, batch: the problem, the parameters at which its loss is differentiated, and
            a batch of N examples. The gradients are those of :func:`funcprecond.per_sample_grads`.
        generator: draws the dropout masks.

    Returns:
        (N, N), with ``g_n · g_m`` in entry (n, m). Costs two thirds of a gradient, and per layer
        the cheaper of two products: over pairs of positions, or over the formed gradients of the
        layer. The gradients of parameters in no layer are always formed.

    Raises:
        ValueError: the model couples the examples of a batch (BatchNorm in training mode), or
            dropout masks are needed and there is no generator.
        RuntimeError: some parameter is in no layer, and ``vmap`` cannot compute its per-sample
            gradients.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.rand(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> fp.per_sample_gram(problem, problem.params, batch).shape
        torch.Size([8, 8])
    """
    gram, constant = _rows(problem, params, batch, generator)
    # The entries of U U^T are c g_n · g_m.
    return gram.gram() / constant


def per_sample_norms(
    problem: Problem,
    params: Params,
    batch: Any,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The Euclidean norms of the per-sample gradients of a batch.

    Args:
        problem, params, batch: the problem, the parameters at which its loss is differentiated, and
            a batch of N examples. The gradients are those of :func:`funcprecond.per_sample_grads`.
        generator: draws the dropout masks.

    Returns:
        (N,). Costs about as much time as :func:`funcprecond.per_sample_gram`, but no (N, N) matrix
        is formed.

    Raises:
        ValueError: the model couples the examples of a batch (BatchNorm in training mode), or
            dropout masks are needed and there is no generator.
        RuntimeError: some parameter is in no layer, and ``vmap`` cannot compute its per-sample
            gradients.

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
    """The empirical Fisher matrix ``U^T U``, where U has the rows ``√c g_n``, and c."""
    evaluation = Evaluation(problem, params, batch, generator=generator, layers=True)
    (layers,) = PER_SAMPLE.each(evaluation, ())
    return Gram.from_layers(layers, params), layers.scale
