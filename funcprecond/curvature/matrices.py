r"""The Hessian, Gauss-Newton and Fisher matrix of a loss on data, as operators.

On one batch its linearisation is opened at the first product and kept, so that each further one
costs 1.0 to 2.6 gradients. On many batches every product is one pass over them, each batch opened
anew; the matrix is that of the loss over all of the data, however it is split. With a mean loss,
:math:`L = c \sum_n \ell_n`, the batches' matrices are averaged with weights :math:`1 / c_b`.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.curvature.fisher import check_labels, draw_labels, fisher_product
from funcprecond.curvature.layers import Labels
from funcprecond.curvature.operator import Operator, stack, unstack
from funcprecond.evaluation import Evaluation, untransformed
from funcprecond.problem import Buffers, Params, Problem

__all__ = ["GGN", "Fisher", "Hessian", "each_batch"]


@dataclasses.dataclass(frozen=True, eq=False)
class _OnData(Operator):
    """A curvature matrix of a problem's loss at one point.

    Attributes:
        problem, params: whose, and where.
        batch: one batch; or
        batches: an iterable of them that can be gone through again and again, such as a list or a
            ``DataLoader`` (wrapped in ``tqdm`` to see its progress).
        buffers: the model's buffers; the problem's own by default.
        generator: seeds the dropout masks and sampled labels, once: all products see the same.
        chunk_size: columns at a time under ``vmap`` where a stack is multiplied; None takes one
            after another.
    """

    problem: Problem
    params: Params
    batch: Any = None
    batches: Iterable[Any] | None = dataclasses.field(default=None, kw_only=True)
    buffers: Buffers | None = dataclasses.field(default=None, kw_only=True)
    generator: torch.Generator | None = dataclasses.field(default=None, kw_only=True)
    chunk_size: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        check_data(self.batch, self.batches)
        object.__setattr__(self, "_seed", seed_of(self.generator))
        object.__setattr__(self, "_kept", {})
        object.__setattr__(self, "_inside", not untransformed((self.params, self.buffers)))

    @property
    def like(self) -> Params:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The parameters."""
        return self.params

    def matvec(self, vector: Params) -> Params:
        return self._over_data(lambda e, noise: self._product(e, vector, noise), vector)

    def matmat(self, vectors: Params, chunk_size: int | None = None) -> Params:
        chunk_size = self.chunk_size if chunk_size is None else chunk_size
        if chunk_size is not None:
            return super().matmat(vectors, chunk_size)
        # Each batch is opened once for all columns.
        return self._over_data(
            lambda e, noise: stack([self._product(e, v, noise) for v in unstack(vectors)])
        )

    def loss(self) -> Tensor:
        """The loss over all of the data, a 0-d tensor."""
        return self._over_data(lambda e, _: {"": e.loss})[""]

    def gradient(self) -> Params:
        """The loss's gradient over all of the data."""
        return self._over_data(lambda e, _: e.grads)

    @abc.abstractmethod
    def _product(self, evaluation: Evaluation, vector: Params, noise: Any) -> Params:
        """The batch's matrix times a vector."""

    def _draw(self, batch: Any, generator: torch.Generator | None) -> Any:
        """What a product needs beside the vector."""
        return None

    def _over_data(self, of: Callable[[Evaluation, Any], Params], along=None) -> Params:
        if self.batches is None:
            return of(*self._opened())
        opened = (self._open(b, i, along) for i, b in enumerate(self.batches))
        return mean_over(((e, of(e, noise)) for e, noise in opened))

    def _opened(self) -> tuple[Evaluation, Any]:
        """The one batch, kept; a run made inside of a transform must not outlive it."""
        plain = untransformed((self.params, self.buffers, self.batch))
        if not plain and not self._inside:  # pyright: ignore[reportAttributeAccessIssue]
            return self._open(self.batch, 0)
        kept: dict = self._kept  # pyright: ignore[reportAttributeAccessIssue]
        if "run" not in kept:
            kept["run"] = self._open(self.batch, 0)
        return kept["run"]

    def _open(self, batch: Any, index: int, along: Params | None = None) -> tuple[Evaluation, Any]:
        generator = seeded(self._seed, index)  # pyright: ignore[reportAttributeAccessIssue]
        noise = self._draw(batch, generator)
        options = {"buffers": self.buffers, "generator": generator}
        along = None if self._twice else along
        twice = along is None
        evaluation = Evaluation(
            self.problem, self.params, batch, twice=twice, along=along, **options
        )
        return evaluation, noise

    _twice = False


class Hessian(_OnData):
    """The loss's Hessian; see :class:`_OnData` for the arguments.

    1.4 to 2.6 gradients a product on a kept batch, 2.5 to 3.3 on a streamed one.
    """

    _twice = True

    def _product(self, evaluation: Evaluation, vector: Params, noise: Any) -> Params:
        return evaluation.hvp(vector)


class GGN(_OnData):
    """The loss's Gauss-Newton matrix ``J^T H_L J``; see :class:`_OnData` for the arguments.

    1.0 to 1.6 gradients a product on a kept batch, 1.7 on a streamed one.
    """

    def _product(self, evaluation: Evaluation, vector: Params, noise: Any) -> Params:
        return evaluation.ggn_mv(vector)


@dataclasses.dataclass(frozen=True, eq=False)
class Fisher(_OnData):
    """The Fisher matrix; see :class:`_OnData` for the other arguments.

    Attributes:
        labels: "exact", "mc" or "empirical"; see :mod:`funcprecond.curvature.fisher`.
        samples: sampled labels for each term, with "mc".
    """

    labels: Labels = dataclasses.field(default="exact", kw_only=True)
    samples: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self):
        check_labels(self.labels, self.samples)
        super().__post_init__()

    def _product(self, evaluation: Evaluation, vector: Params, noise: Any) -> Params:
        return fisher_product(evaluation, vector, self.labels, noise)

    def _draw(self, batch: Any, generator: torch.Generator | None) -> Any:
        if self.labels != "mc":
            return None
        return draw_labels(self.problem, batch, self.samples, generator)


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
        total = tree.add(total, value) if total else value
    if not weights:
        msg = "there are no batches: pass a list or a DataLoader, not an iterator that is used up"
        raise ValueError(msg)
    if _is_sum(evaluation):  # pyright: ignore[reportPossiblyUnboundVariable]
        return total
    whole = torch.stack(weights).sum()
    return {k: x / whole.to(x.dtype) for k, x in total.items()}


def batch_weight(evaluation: Evaluation) -> Tensor:
    """What a batch's share of the data counts, a 0-d tensor: ``1 / c``, and 1 for a summed loss."""
    constant = evaluation.constant
    return torch.ones_like(constant) if _is_sum(evaluation) else 1 / constant


def _is_sum(evaluation: Evaluation) -> bool:
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
