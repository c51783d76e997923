"""The gradient noise scale: how large a batch has to be before more examples hardly help."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.estimators.gradient_statistics import PER_SAMPLE
from funcprecond.evidence import observe
from funcprecond.linalg import treemath
from funcprecond.operators.data import check_data, each_batch
from funcprecond.problems import Problem
from funcprecond.representation.gram import Gram
from funcprecond.tree import Params, state

__all__ = ["NoiseScale", "gradient_noise_scale"]


@state
class NoiseScale:
    """How noisy the gradient is (McCandlish et al., arXiv 1812.06162).

    Attributes:
        scale: the batch size at which the noise is as large as the gradient, ``tr S / |g|²``.
        variance: ``tr S``, the trace of the covariance of one example's gradient.
        squared_norm: ``|g|²`` of the true gradient. Like ``variance`` it is unbiased, so that it
            may come out negative where the noise drowns it.
        examples: how many were seen.
    """

    scale: Tensor
    variance: Tensor
    squared_norm: Tensor
    examples: Tensor


def gradient_noise_scale(
    problem: Problem,
    params: Params,
    batch: Any = None,
    *,
    batches: Iterable[Any] | None = None,
    generator: torch.Generator | None = None,
) -> NoiseScale:
    """The gradient noise scale of a mean loss, from the norms of per-sample gradients.

    Args:
        problem, params: whose, and where.
        batch, batches: one batch, or an iterable of them; at least two examples in all.
        generator: draws dropout masks.

    Returns:
        A :class:`NoiseScale`. Costs about 1.3 gradients of all the data.

    Raises:
        ValueError: there are fewer than two examples, or the model couples the examples of a batch.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.rand(8, 4), torch.arange(8) % 3
        >>> int(fp.gradient_noise_scale(problem, problem.params, batch).examples)
        8
    """
    check_data(batch, batches)
    total: Params = {}
    squares, count = None, 0
    for b in each_batch(batch, batches):
        found = observe(problem, params, b, (PER_SAMPLE,), generator=generator)
        n = tree.leaves(found.outputs)[0].shape[0]
        layers = found[PER_SAMPLE]
        # Rows are 1/n of an example's gradient under a mean loss, and sum to the batch's.
        here = n**2 * (Gram.from_layers(layers, params).squared_norms() / layers.scale).sum()
        squares = here if squares is None else squares + here
        grads = treemath.mul(found.grads, float(n))
        total = treemath.add(total, grads) if total else grads
        count += n
    if squares is None or count < 2:
        msg = "the noise of a gradient takes at least two examples"
        raise ValueError(msg)
    mean_square = squares / count
    whole = treemath.dot(total, total) / count**2
    variance = (mean_square - whole) * count / (count - 1)
    signal = whole - variance / count
    examples = torch.full_like(variance, count)
    return NoiseScale(variance / signal, variance, signal, examples)
