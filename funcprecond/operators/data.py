"""Operators on one batch or on many: how values of batches combine into a value of all the data."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.linalg import treemath
from funcprecond.tree import Params

__all__ = ["batch_weight", "check_data", "each_batch", "is_sum", "mean_over", "seed_of", "seeded"]


def mean_over(parts: Iterable[tuple[Evaluation, Params]]) -> Params:
    """Combine the values of single batches into the value of all the data.

    For a summed loss this is the sum of the batches' values; for a mean loss it is their average
    with the weights of :func:`batch_weight`, so the result does not depend on the split.

    Args:
        parts: for each batch its evaluation and its value, a dict of tensors.

    Returns:
        A dict of tensors like the value of a batch.

    Raises:
        ValueError: there are no batches.
    """
    total: Params = {}
    weights: list[Tensor] = []
    for evaluation, value in parts:
        weight = batch_weight(evaluation)
        weights.append(weight)
        # The mean of a batch in which every term is ignored is 0 / 0; its weight is zero.
        value = {k: torch.where(weight > 0, x * weight.to(x.dtype), 0.0) for k, x in value.items()}
        total = treemath.add(total, value) if total else value
    if not weights:
        msg = (
            "batches= contains no batches: pass a non-empty list or DataLoader, not an exhausted "
            "iterator"
        )
        raise ValueError(msg)
    if is_sum(evaluation):  # pyright: ignore[reportPossiblyUnboundVariable]
        return total
    whole = torch.stack(weights).sum()
    return {k: x / whole.to(x.dtype) for k, x in total.items()}


def batch_weight(evaluation: Evaluation) -> Tensor:
    """The weight of a batch in the mean over all the data: ``1 / c``, or 1 for a summed loss.

    ``c`` is the loss's reduction constant on this batch, such as one over the number of examples.

    Returns:
        A 0-d tensor.
    """
    constant = evaluation.constant
    return torch.ones_like(constant) if is_sum(evaluation) else 1 / constant


def is_sum(evaluation: Evaluation) -> bool:
    """Whether the loss is a sum over its terms, not a mean."""
    return getattr(evaluation.problem.loss, "reduction", "mean") == "sum"


def each_batch(batch: Any, batches: Iterable[Any] | None) -> Iterator[Any]:
    """Iterate over ``batches``, or over the single ``batch`` if ``batches`` is None."""
    return iter((batch,) if batches is None else batches)


def check_data(batch: Any, batches: Iterable[Any] | None) -> None:
    """Check that the data are either one batch or an iterable that can be repeated.

    Raises:
        ValueError: neither or both of ``batch`` and ``batches`` are given.
        TypeError: ``batches`` is an iterator, which can be read only once.
    """
    if (batch is None) == (batches is None):
        msg = "pass either one batch, or batches=, an iterable of batches, but not both"
        raise ValueError(msg)
    if isinstance(batches, Iterator):
        msg = (
            "batches= must be an iterable that can be read repeatedly: pass a list or a "
            "DataLoader, not an iterator"
        )
        raise TypeError(msg)


def seed_of(generator: torch.Generator | None) -> int | None:
    """Draw a seed from the generator, so that every later pass can draw the same random numbers."""
    if generator is None:
        return None
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def seeded(seed: int | None, index: int) -> torch.Generator | None:
    """The generator for the batch with this index; None if there is no seed."""
    return None if seed is None else torch.Generator().manual_seed(seed + index)
