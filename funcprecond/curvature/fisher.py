r"""The Fisher matrix :math:`c \sum_v \sum_n g_{vn} g_{vn}^T`, by products.

Its rows are cotangents pulled back, example by example: at the data's own labels ("empirical"), at
labels sampled from the model's prediction ("mc", unbiased), or at all that the expectation takes
("exact", which is the Gauss-Newton matrix). A product needs no row: with ``J v`` at hand,
:math:`F v = c J^T \sum_v u_v (u_v \cdot J v)`, the inner product taken within each example.
"""

from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.curvature.layers import Labels, check_labels
from funcprecond.evaluation import Evaluation
from funcprecond.problem import Buffers, Params, Problem

__all__ = ["draw_labels", "fisher_mv", "fisher_product"]


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
    """The Fisher matrix of the problem's likelihood on ``batch`` times ``vector``.

    Args:
        problem, params, batch, vector: the product's.
        labels: "exact", "mc" or "empirical"; see :mod:`funcprecond.curvature.fisher`.
        samples: sampled labels for each term, with "mc".
        noise: the random numbers of "mc", from the loss's ``draw``; drawn if not given.
        buffers: the model's buffers; the problem's own by default.
        generator: draws labels and dropout masks.

    Costs about 1.7 gradients; for many products make a :class:`funcprecond.Fisher`.

    Raises:
        TypeError: the loss is not a likelihood that is known, and ``labels`` is not "empirical".
    """
    check_labels(labels, samples)
    if labels == "mc" and noise is None:
        noise = draw_labels(problem, batch, samples, generator)
    options = {"buffers": buffers, "generator": generator}
    evaluation = Evaluation(problem, params, batch, along=vector, **options)
    return fisher_product(evaluation, vector, labels, noise)


def fisher_product(
    evaluation: Evaluation, vector: Params, labels: Labels, noise: Tensor | None
) -> Params:
    """``F vector`` on an opened batch."""
    loss = evaluation.problem.loss
    outputs, targets = evaluation.outputs, evaluation.targets
    if labels == "exact":
        loss.exact(outputs, targets)  # raises if there is no likelihood
        return evaluation.ggn_mv(vector)
    pushed = evaluation.jvp(vector)
    if labels == "empirical":
        cotangents = loss.empirical(outputs, targets)
        within = [
            (u * t).flatten(1).sum(1)
            for u, t in zip(tree.leaves(cotangents), tree.leaves(pushed), strict=True)
        ]
        inner = evaluation.constant * sum(within)
        return evaluation.pull(
            tree.map(lambda u: u * inner.reshape(-1, *[1] * (u.ndim - 1)).to(u.dtype), cotangents)
        )
    cotangents = loss.sampled(outputs, targets, noise)  # pyright: ignore[reportArgumentType]
    inner = evaluation.constant * (cotangents * pushed).flatten(2).sum(2)
    inner = inner.reshape(*inner.shape, *[1] * (cotangents.ndim - 2))
    return evaluation.pull((cotangents * inner).sum(0))


def draw_labels(
    problem: Problem, batch: Any, samples: int, generator: torch.Generator | None
) -> Tensor:
    """The random numbers from which labels are sampled."""
    return problem.loss.draw(problem.split(batch)[1], samples, generator)
