r"""The Fisher matrix :math:`F = c \sum_v \sum_n g_{vn} g_{vn}^T`, by products.

Its rows :math:`g_{vn}` are cotangents pulled back to the parameters, one by one for each example n.
The cotangents are taken at the data's own labels ("empirical"), at labels sampled from the model's
prediction ("mc", an unbiased estimate), or they are all that the expectation requires ("exact",
with which F is the Gauss-Newton matrix). If the layers cover every parameter, products use the
rows, layer by layer (:mod:`funcprecond.autodiff.fisher_rows`). Otherwise no row is formed: from
``J x`` and the cotangents :math:`u_v` follows :math:`F x = c J^T \sum_v u_v (u_v \cdot J x)`, with
the inner product taken within each example.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.fisher_rows import FisherRows, rows_of
from funcprecond.linalg.precision import wide
from funcprecond.losses.base import Labels, check_labels
from funcprecond.problems import Problem
from funcprecond.tracing import is_eager
from funcprecond.tree import Buffers, Params

__all__ = ["draw_labels", "fisher_form", "fisher_mv", "fisher_product", "fisher_rows"]


def fisher_mv(
    problem: Problem,
    params: Params,
    batch: Any,
    vector: Params,
    *,
    labels: Labels = "exact",
    samples: int = 1,
    noise: Tensor | None = None,
    buffers: Buffers | None = None,
    generator: torch.Generator | None = None,
) -> Params:
    """The Fisher matrix of the likelihood of a problem, times a vector.

    Args:
        problem, params, batch: the problem, and the point and the batch to evaluate.
        vector: shaped like ``params``.
        labels: "exact" takes the expectation over the model's prediction, "mc" samples labels from
            it, and "empirical" takes the labels of the data.
        samples: the number of sampled labels for each term of the loss, with "mc".
        noise: the random numbers of "mc", from the ``label_noise`` of the loss; by default they are
            drawn from ``generator``.
        buffers: the model's buffers; by default those of the problem.
        generator: the source of randomness for labels and dropout masks.

    Returns:
        A dict shaped like ``params``. Costs about 1.5 gradients, or 2 if the product runs the model
        because the layers do not cover every parameter. For many products, use
        :class:`funcprecond.Fisher`.

    Raises:
        TypeError: the loss has no known likelihood, and ``labels`` is not "empirical".
        ValueError: ``labels`` or ``samples`` is not allowed, random numbers are needed and there is
            no generator, or the batch is empty.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.ones(8, 4), torch.arange(8) % 3
        >>> fp.fisher_mv(problem, problem.params, batch, problem.params)["weight"].shape
        torch.Size([3, 4])
    """
    check_labels(labels, samples)
    if labels == "mc" and noise is None:
        noise = draw_labels(problem, batch, samples, generator)
    options = {"buffers": buffers, "generator": generator}
    if labels == "exact" or not is_eager((params, batch, buffers, vector, noise)):
        evaluation = Evaluation(problem, params, batch, twice=True, **options)
        return fisher_product(evaluation, vector, labels, noise, keep=False)
    evaluation = Evaluation(problem, params, batch, layers=True, twice=True, **options)
    rows = fisher_rows(evaluation, labels, noise, keep=False)
    if rows is None:
        return fisher_product(evaluation, vector, labels, noise, keep=False)
    del evaluation  # frees the graph of the run, which the rows do not need
    return rows.product(vector)


def fisher_rows(
    evaluation: Evaluation, labels: Labels, noise: Tensor | None, keep: bool = True
) -> FisherRows | None:
    """The rows of the sampled or empirical matrix on an opened batch, or None.

    Args:
        evaluation: the batch, opened with ``layers=True``.
        labels, noise: see :func:`fisher_mv`.
        keep: whether the evaluation is still used afterwards; if not, its graph is freed.

    Returns:
        None if the layers do not cover every parameter, see
        :func:`funcprecond.autodiff.fisher_rows.rows_of`.
    """
    return rows_of(evaluation, evaluation.cotangents(labels, noise), evaluation.constant, keep)


def fisher_product(
    evaluation: Evaluation,
    vector: Params,
    labels: Labels,
    noise: Tensor | None,
    keep: bool = True,
) -> Params:
    """``F vector`` on an opened batch, by products with J and its transpose.

    Args:
        evaluation: the batch, opened with ``twice=True``.
        vector, labels, noise: see :func:`fisher_mv`.
        keep: whether the evaluation is still used afterwards; if not, its graph is freed.
    """
    if labels == "exact":
        # This raises an error if the loss has no known likelihood.
        evaluation.cotangents("exact", ())
        return evaluation.ggn_mv(vector, keep)
    places = evaluation.examples.outputs
    terms = []
    for cotangent, inner in _inner_products(evaluation, vector, labels, noise, keep):
        scaled = evaluation.constant * inner
        parts = zip(tree.floating(cotangent), places, strict=True)
        terms.append([u if place is None else place.spread(scaled, u) for u, place in parts])
    total = [functools.reduce(torch.add, of_leaf) for of_leaf in zip(*terms, strict=True)]
    return evaluation.pull(tree.with_floating(evaluation.outputs, total), keep)


def fisher_form(
    evaluation: Evaluation, vector: Params, labels: Labels, noise: Tensor | None
) -> Tensor:
    """``vector · F vector`` on an opened batch, a 0-d tensor, :func:`wide`, without a pull-back."""
    if labels == "exact":
        evaluation.cotangents("exact", ())
        return evaluation.ggn_form(vector)
    inner = [s for _, s in _inner_products(evaluation, vector, labels, noise)]
    return evaluation.constant * sum(wide(s).square().sum() for s in inner)


def _inner_products(
    evaluation: Evaluation,
    vector: Params,
    labels: Labels,
    noise: Tensor | None,
    keep: bool = True,
) -> Iterator[tuple[Any, Tensor]]:
    """Each cotangent, with the inner product of each example's part with ``J vector``, (N,)."""
    places = evaluation.examples.outputs
    pushed = tree.floating(evaluation.jvp(vector, keep))
    for cotangent in evaluation.cotangents(labels, noise):
        evaluation.examples.check_cotangent(cotangent)
        parts = zip(tree.floating(cotangent), pushed, places, strict=True)
        inner = [place.sum_others(u * t) for u, t, place in parts if place is not None]
        yield cotangent, torch.stack(inner).sum(0)


def draw_labels(
    problem: Problem, batch: Any, samples: int, generator: torch.Generator | None
) -> Tensor:
    """Draw the random numbers from which labels are sampled."""
    return problem.loss.label_noise(problem.split(batch)[1], samples, generator)
