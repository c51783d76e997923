r"""The Fisher matrix :math:`c \sum_v \sum_n g_{vn} g_{vn}^T`, by products.

Its rows are cotangents pulled back, example by example: at the data's own labels ("empirical"), at
labels sampled from the model's prediction ("mc", unbiased), or at all that the expectation takes
("exact", which is the Gauss-Newton matrix). Where the layers tell of every parameter, products are
taken from the rows by layer (:mod:`funcprecond.autodiff.fisher_rows`). Elsewhere they need no row: with
``J v`` at hand, :math:`F v = c J^T \sum_v u_v (u_v \cdot J v)`, the inner product taken within
each example.
"""

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
    """The Fisher matrix of a problem's likelihood times a vector.

    Args:
        problem, params, batch: whose, and where.
        vector: shaped like ``params``.
        labels: "exact", "mc" or "empirical"; see :mod:`funcprecond.curvature.fisher`.
        samples: sampled labels for each term, with "mc".
        noise: the random numbers of "mc", from the loss's ``label_noise``; drawn if not given.
        buffers: the model's buffers; the problem's own by default.
        generator: draws labels and dropout masks.

    Returns:
        Shaped like ``params``. Costs about 1.5 gradients, 2 where it takes the model; for many
        products make a :class:`funcprecond.Fisher`.

    Raises:
        TypeError: the loss is not a likelihood that is known, and ``labels`` is not "empirical".
        ValueError: ``labels`` or ``samples`` is out of range, or random numbers are needed and
            there is no generator.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.rand(8, 4), torch.arange(8) % 3
        >>> product = fp.fisher_mv(problem, problem.params, batch, problem.params)
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
    del evaluation  # the run's graph, which the rows do not need
    return rows.product(vector)


def fisher_rows(
    evaluation: Evaluation, labels: Labels, noise: Tensor | None, keep: bool = True
) -> FisherRows | None:
    """The rows of the sampled or empirical matrix, on a batch opened with ``taps``; or None.

    Without ``keep`` the evaluation is of no use after them.
    """
    return rows_of(evaluation, evaluation.cotangents(labels, noise), evaluation.constant, keep)


def fisher_product(
    evaluation: Evaluation,
    vector: Params,
    labels: Labels,
    noise: Tensor | None,
    keep: bool = True,
) -> Params:
    """``F vector`` on an opened batch, through the model."""
    if labels == "exact":
        # Raises if there is no likelihood.
        evaluation.cotangents("exact", ())
        return evaluation.ggn_mv(vector, keep)
    total = None
    for cotangent, inner in _inner_products(evaluation, vector, labels, noise, keep):
        scaled = evaluation.constant * inner
        one = tree.map(
            lambda u, s=scaled: u * s.reshape(-1, *[1] * (u.ndim - 1)).to(u.dtype), cotangent
        )
        total = one if total is None else tree.map(torch.add, total, one)
    return evaluation.pull(total, keep)


def fisher_form(
    evaluation: Evaluation, vector: Params, labels: Labels, noise: Tensor | None
) -> Tensor:
    """``vector · F vector`` on an opened batch, a 0-d tensor, :func:`wide`: no pull-back."""
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
    """Each cotangent with (N,) its inner products with ``J vector``, within each example."""
    pushed = tree.leaves(evaluation.jvp(vector, keep))
    for cotangent in evaluation.cotangents(labels, noise):
        pairs = zip(tree.leaves(cotangent), pushed, strict=True)
        yield cotangent, torch.stack([(u * t).flatten(1).sum(1) for u, t in pairs]).sum(0)


def draw_labels(
    problem: Problem, batch: Any, samples: int, generator: torch.Generator | None
) -> Tensor:
    """The random numbers from which labels are sampled."""
    return problem.loss.label_noise(problem.split(batch)[1], samples, generator)
