"""The gradient noise scale: the batch size beyond which more examples hardly improve a step."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

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
    """The gradient noise scale, from the norms of per-sample gradients.

    The gradient of an example is that of its own loss, so that the gradient of a mean loss is the
    mean over the examples, and that of a summed loss the sum. If a mean loss weights or ignores
    some terms, then each example has its share of the terms in all the data.

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
    is_sum, count = problem.loss.is_sum, 0
    total: Params = {}
    squares, weights = [], []
    for b in each_batch(batch, batches):
        found = observe(problem, params, b, (PER_SAMPLE,), generator=generator)
        layers = found[PER_SAMPLE]
        # The measured rows are c times the gradients of the examples' terms, and the scale is 1/c.
        norms = Gram.from_layers(layers, params).squared_norms() / layers.scale
        weight = torch.ones_like(layers.scale) if is_sum else layers.scale
        # The mean of a batch in which every term is ignored is 0 / 0; its weight is zero.
        counts = weight > 0
        squares.append(torch.where(counts, weight**2 * norms.sum(), 0.0))
        weights.append(weight)
        grads = treemath.where(counts, treemath.mul(found.grads, weight), 0.0)
        total = treemath.add(total, grads) if total else grads
        count += norms.numel()
    if count < 2:
        msg = (
            f"the gradient noise scale needs at least two examples, but there are {count}: pass a "
            "larger batch, or several batches"
        )
        raise ValueError(msg)
    # In a mean over all the data, an example's gradient is ``N c`` times that of its terms.
    factor = 1.0 if is_sum else count / torch.stack(weights).sum()
    mean_square = factor**2 * torch.stack(squares).sum() / count
    whole = factor**2 * treemath.dot(total, total) / count**2
    variance = (mean_square - whole) * count / (count - 1)
    signal = whole - variance / count
    examples = torch.full_like(variance, count)
    return NoiseScale(variance / signal, variance, signal, examples)
