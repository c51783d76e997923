"""Operators on one batch or on many: how values of batches combine into a value of all the data."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.linalg import treemath
from funcprecond.linalg.precision import wide
from funcprecond.tree import Params

__all__ = [
    "batch_weight",
    "check_data",
    "check_repeats",
    "each_batch",
    "fingerprint",
    "is_sum",
    "mean_over",
    "seed_of",
    "seeded",
]

# Sums of the same numbers differ by rounding if they are added in another order.
SAME = 1e-9


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


def fingerprint(batch: Any) -> Tensor:
    """Numbers by which a batch is recognized in the next pass over the data.

    Args:
        batch: any tree; what is no tensor is left out.

    Returns:
        (3,): the sum of all entries, the sum of their squares, and a sum with weights that depend
        on the position. A change of the order of the examples changes only the last.
    """
    sums = [torch.zeros(3, dtype=torch.float64)]
    for x in tree.leaves(batch):
        if isinstance(x, Tensor) and x.numel() and not x.is_complex():
            flat = wide(x.detach().reshape(-1))
            weights = torch.arange(len(flat), dtype=flat.dtype, device=flat.device).add_(1).sin_()
            sums.append(torch.stack([flat.sum(), flat.dot(flat), flat.dot(weights)]).to("cpu"))
    return torch.stack(sums).sum(0).double()


def check_repeats(
    first: list[Tensor], now: list[Tensor], evaluation: Evaluation, random: bool
) -> None:
    """Check that a pass over the data gives the same matrix as the first one.

    If the batches differ, it does only if all data are the same, in other batches, if no random
    numbers belong to the places in a batch, and if the model does not couple the examples.

    Args:
        first, now: the fingerprints of all batches.
        evaluation: the run of the model on one of the batches.
        random: whether random numbers are drawn for each batch.

    Raises:
        ValueError: the passes give different matrices.
    """
    a, b = torch.stack(first), torch.stack(now)
    if a.shape == b.shape and torch.allclose(a, b, rtol=SAME, atol=0.0, equal_nan=True):
        return
    fix = (
        "batches= gives other batches in this pass than in the first, so that the operator would "
        "be another matrix at each product: {}. Pass DataLoader(..., shuffle=False) without random "
        "augmentations, or list(loader)"
    )
    if not torch.allclose(a.sum(0)[:2], b.sum(0)[:2], rtol=SAME, atol=0.0, equal_nan=True):
        msg = fix.format(
            "the data are not the same, as with drop_last=True or random augmentations"
        )
        raise ValueError(msg)
    if random:
        msg = fix.format("the random numbers of a generator= belong to the places in the batches")
        raise ValueError(msg)
    try:
        evaluation.examples.require_apart()
    except ValueError as error:
        msg = fix.format("the model couples the examples of a batch")
        raise ValueError(msg) from error


def seed_of(generator: torch.Generator | None) -> int | None:
    """Draw a seed from the generator, so that every later pass can draw the same random numbers."""
    if generator is None:
        return None
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def seeded(seed: int | None, index: int) -> torch.Generator | None:
    """The generator for the batch with this index; None if there is no seed."""
    return None if seed is None else torch.Generator().manual_seed(seed + index)
