"""The gradient noise scale: the batch size beyond which more examples hardly improve a step."""

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
    """The noise scale of the gradient, and the two estimates that it is the quotient of.

    S is the covariance matrix of a per-sample gradient, and g its mean, the true gradient
    (McCandlish et al., arXiv 1812.06162). All attributes are 0-d tensors.

    Attributes:
        scale: ``tr S / |g|²``, the batch size at which the noise of the batch's gradient is as
            large as g.
        variance: an unbiased estimate of ``tr S``.
        squared_norm: an unbiased estimate of ``|g|²``, which is negative for some data if g is
            small compared with the noise.
        examples: the number of examples.
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

    McCandlish et al., arXiv 1812.06162, section 2.2 (the "simple" noise scale).

    Args:
        problem, params: the problem, and the parameters at which its loss is differentiated.
        batch: one batch. Pass either this or ``batches``.
        batches: an iterable of batches, such as a list or a ``DataLoader``. There must be at least
            two examples in all.
        generator: draws the dropout masks.

    Returns:
        A :class:`funcprecond.NoiseScale`. Costs about 1.3 gradients of all the data.

    Raises:
        ValueError: there are fewer than two examples, the model couples the examples of a batch,
            neither or both of ``batch`` and ``batches`` are given, or dropout masks are needed and
            there is no generator.
        TypeError: ``batches`` is an iterator.

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
        # With a mean loss the measured rows are 1/n of the per-sample gradients.
        here = n**2 * (Gram.from_layers(layers, params).squared_norms() / layers.scale).sum()
        squares = here if squares is None else squares + here
        grads = treemath.mul(found.grads, float(n))
        total = treemath.add(total, grads) if total else grads
        count += n
    if squares is None or count < 2:
        msg = (
            f"the gradient noise scale needs at least two examples, but there are {count}: pass a "
            "larger batch, or several batches"
        )
        raise ValueError(msg)
    mean_square = squares / count
    whole = treemath.dot(total, total) / count**2
    variance = (mean_square - whole) * count / (count - 1)
    signal = whole - variance / count
    examples = torch.full_like(variance, count)
    return NoiseScale(variance / signal, variance, signal, examples)
