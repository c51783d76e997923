"""One batch or many: how the values of single batches make that of all of the data."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.linalg import treemath
from funcprecond.tree import Params

__all__ = ["batch_weight", "check_data", "each_batch", "is_sum", "mean_over", "seed_of", "seeded"]


def mean_over(parts: Iterable[tuple[Evaluation, Params]]) -> Params:
    """Values of single batches combined into that of all data, by the loss's own reduction.

    Raises:
        ValueError: there are no batches.
    """
    total: Params = {}
    weights: list[Tensor] = []
    for evaluation, value in parts:
        weight = batch_weight(evaluation)
        weights.append(weight)
        # A batch whose every term is ignored has a mean of 0 / 0, and no share.
        value = {k: torch.where(weight > 0, x * weight.to(x.dtype), 0.0) for k, x in value.items()}
        total = treemath.add(total, value) if total else value
    if not weights:
        msg = "there are no batches: pass a list or a DataLoader, not an iterator that is used up"
        raise ValueError(msg)
    if is_sum(evaluation):  # pyright: ignore[reportPossiblyUnboundVariable]
        return total
    whole = torch.stack(weights).sum()
    return {k: x / whole.to(x.dtype) for k, x in total.items()}


def batch_weight(evaluation: Evaluation) -> Tensor:
    """What a batch's share of the data counts, a 0-d tensor: ``1 / c``, and 1 for a summed loss."""
    constant = evaluation.constant
    return torch.ones_like(constant) if is_sum(evaluation) else 1 / constant


def is_sum(evaluation: Evaluation) -> bool:
    """Whether the loss is a sum over all data, not a mean."""
    return getattr(evaluation.problem.loss, "reduction", "mean") == "sum"


def each_batch(batch: Any, batches: Iterable[Any] | None) -> Iterator[Any]:
    """The one batch, or the batches."""
    return iter((batch,) if batches is None else batches)


def check_data(batch: Any, batches: Iterable[Any] | None) -> None:
    """Raise ValueError unless one is given, and TypeError if it can be gone through once only."""
    if (batch is None) == (batches is None):
        msg = "pass either one batch, or batches=, an iterable of them"
        raise ValueError(msg)
    if isinstance(batches, Iterator):
        msg = (
            "batches= is gone through once a product: pass a list or a DataLoader, not an iterator"
        )
        raise TypeError(msg)


def seed_of(generator: torch.Generator | None) -> int | None:
    """A seed drawn from the generator, once, so that all later passes can draw the same."""
    if generator is None:
        return None
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def seeded(seed: int | None, index: int) -> torch.Generator | None:
    """The generator of one batch."""
    return None if seed is None else torch.Generator().manual_seed(seed + index)
