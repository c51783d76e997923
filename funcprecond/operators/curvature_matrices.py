r"""The Hessian, Gauss-Newton and Fisher matrix of a loss on data, as operators.

On one batch its linearisation is opened at the first product and kept, so that each further one
costs 0.9 to 2.2 gradients. On many batches every product is one pass over them, each batch opened
anew; the matrix is that of the loss over all of the data, however it is split. With a mean loss,
:math:`L = c \sum_n \ell_n`, the batches' matrices are averaged with weights :math:`1 / c_b`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.fisher import draw_labels, fisher_form, fisher_product, fisher_rows
from funcprecond.linalg.treemath import wide_dot
from funcprecond.losses import Loss
from funcprecond.losses.base import Labels, check_labels
from funcprecond.operators.data import check_data, mean_over, seed_of, seeded
from funcprecond.operators.diagonal import exact_diagonal
from funcprecond.operators.operator import Operator
from funcprecond.operators.vector_stacks import in_chunks, stack, unstack
from funcprecond.problems import Problem
from funcprecond.tracing import is_eager
from funcprecond.tree import Buffers, Params

__all__ = ["GGN", "Fisher", "Hessian"]


@dataclasses.dataclass(frozen=True, eq=False)
class _OnData(Operator):
    """A curvature matrix of a problem's loss at one point.

    Attributes:
        problem, params: whose, and where.
        batch: one batch; or
        batches: an iterable of them that can be gone through again and again, such as a list or a
            ``DataLoader``.
        progress: called with ``batches`` at each pass over them, and gone through in their place:
            ``tqdm.tqdm``, or ``rich.progress.track``.
        buffers: the model's buffers; the problem's own by default.
        generator: seeds the dropout masks and sampled labels, once: all products see the same.
        chunk_size: columns at a time under ``vmap`` where a stack is multiplied; None takes one
            after another.
    """

    problem: Problem
    params: Params
    batch: Any = None
    batches: Iterable[Any] | None = dataclasses.field(default=None, kw_only=True)
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = dataclasses.field(
        default=None, kw_only=True
    )
    buffers: Buffers | None = dataclasses.field(default=None, kw_only=True)
    generator: torch.Generator | None = dataclasses.field(default=None, kw_only=True)
    chunk_size: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        check_data(self.batch, self.batches)
        object.__setattr__(self, "_seed", seed_of(self.generator))
        object.__setattr__(self, "_kept", {})
        object.__setattr__(self, "_inside", not is_eager((self.params, self.buffers)))

    @property
    def like(self) -> Params:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The parameters."""
        return self.params

    def matvec(self, vector: Params) -> Params:
        return self._over_data(lambda e, noise: self._product(e, vector, noise))

    def matmat(self, vectors: Params, chunk_size: int | None = None) -> Params:
        chunk_size = self.chunk_size if chunk_size is None else chunk_size
        if chunk_size is not None:
            return super().matmat(vectors, chunk_size)
        count = next(iter(vectors.values())).shape[0]
        # Each batch is opened once for all columns.
        return self._over_data(
            lambda e, noise: stack((self._product(e, v, noise) for v in unstack(vectors)), count)
        )

    def products(self, vectors: Params, chunk_size: int | None = None) -> Iterator[Params]:
        chunk_size = self.chunk_size if chunk_size is None else chunk_size
        if chunk_size is None and self.batches is None:
            return (self.matvec(v) for v in unstack(vectors))
        return super().products(vectors, chunk_size)

    def quadratic_forms(self, vectors: Params, chunk_size: int | None = None) -> Tensor:
        def form(vector: Params) -> Params:
            return self._over_data(lambda e, noise: {"": self._form(e, vector, noise)})

        def forms(e: Evaluation, noise: Any) -> Params:
            return {"": torch.stack([self._form(e, v, noise) for v in unstack(vectors)])}

        chunk_size = self.chunk_size if chunk_size is None else chunk_size
        chunked = chunk_size is not None
        found = in_chunks(form, vectors, chunk_size) if chunked else self._over_data(forms)
        return found[""]

    def loss(self) -> Tensor:
        """The loss over all of the data, a 0-d tensor."""
        return self._over_data(lambda e, _: {"": e.loss})[""]

    def gradient(self) -> Params:
        """The loss's gradient over all of the data."""
        return self._over_data(lambda e, _: e.grads)

    @abc.abstractmethod
    def _product(self, evaluation: Evaluation, vector: Params, noise: Any) -> Params:
        """The batch's matrix times a vector."""

    def _form(self, evaluation: Evaluation, vector: Params, noise: Any) -> Tensor:
        """``v · C v`` with the batch's matrix."""
        return wide_dot(vector, self._product(evaluation, vector, noise))

    def _draw(self, batch: Any, generator: torch.Generator | None) -> Any:
        """What a product needs beside the vector."""
        return None

    def _over_data(self, of: Callable[[Evaluation, Any], Params]) -> Params:
        if self.batches is None:
            return of(*self._opened())
        opened = (self._open(b, i) for i, b in enumerate(self._pass()))
        return mean_over(((e, of(e, noise)) for e, noise in opened))

    def _pass(self) -> Iterable[Any]:
        batches: Any = self.batches
        return batches if self.progress is None else self.progress(batches)

    def _opened(self) -> tuple[Evaluation, Any]:
        """The one batch, kept; a run made inside of a transform must not outlive it."""
        plain = is_eager((self.params, self.buffers, self.batch))
        if not plain and not self._inside:  # pyright: ignore[reportAttributeAccessIssue]
            return self._open(self.batch, 0)
        kept: dict = self._kept  # pyright: ignore[reportAttributeAccessIssue]
        if "run" not in kept:
            kept["run"] = self._open(self.batch, 0)
        return kept["run"]

    def _open(self, batch: Any, index: int) -> tuple[Evaluation, Any]:
        generator = seeded(self._seed, index)  # pyright: ignore[reportAttributeAccessIssue]
        noise = self._draw(batch, generator)
        options = {"buffers": self.buffers, "generator": generator}
        evaluation = Evaluation(
            self.problem, self.params, batch, layers=self._layers, twice=True, **options
        )
        return evaluation, noise

    _layers = False

    def _exact_diagonal(self, labels: Labels, samples: int = 1) -> Params | None:
        """The diagonal from layer statistics; None where these do not tell the examples apart."""
        likelihood = type(self.problem.loss).exact is not Loss.exact
        if self.problem.couples_examples() or not (likelihood or labels == "empirical"):
            return None
        seed = self._seed  # pyright: ignore[reportAttributeAccessIssue]
        data = (self.batch, None if self.batches is None else self._pass())
        rest = (labels, samples, self.buffers, seed)
        try:
            return exact_diagonal(self.problem, self.params, *data, *rest)
        except RuntimeError:
            # Some parameter is in no layer, and vmap cannot tell its examples apart.
            return None


class Hessian(_OnData):
    """The loss's Hessian; see :class:`_OnData` for the arguments.

    1.3 to 2.2 gradients a product on a kept batch, 2.1 to 3.3 on a streamed one.
    """

    def _product(self, evaluation: Evaluation, vector: Params, noise: Any) -> Params:
        return evaluation.hvp(vector)


class GGN(_OnData):
    """The loss's Gauss-Newton matrix ``J^T H_L J``; see :class:`_OnData` for the arguments.

    0.9 to 1.4 gradients a product on a kept batch, 1.6 to 2 on a streamed one; a quadratic form,
    which is ``J v`` and no more, about half.
    """

    def _product(self, evaluation: Evaluation, vector: Params, noise: Any) -> Params:
        return evaluation.ggn_mv(vector)

    def _form(self, evaluation: Evaluation, vector: Params, noise: Any) -> Tensor:
        return evaluation.ggn_form(vector)

    def diagonal(self) -> Params:
        """Exact; for a likelihood from layer statistics (:class:`funcprecond.DiagonalGGN`)."""
        found = self._exact_diagonal("exact")
        return super().diagonal() if found is None else found


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
        drawn, rows = noise
        if self.labels != "exact" and (found := rows()):
            return found.product(vector)
        return fisher_product(evaluation, vector, self.labels, drawn)

    def _form(self, evaluation: Evaluation, vector: Params, noise: Any) -> Tensor:
        drawn, rows = noise
        if self.labels != "exact" and (found := rows()):
            return found.form(vector)
        return fisher_form(evaluation, vector, self.labels, drawn)

    def _open(self, batch: Any, index: int) -> tuple[Evaluation, Any]:
        evaluation, drawn = super()._open(batch, index)
        rows = functools.cache(lambda: fisher_rows(evaluation, self.labels, drawn))
        return evaluation, (drawn, rows)

    @property
    def _layers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.labels != "exact" and is_eager((self.params, self.buffers, self.batch))

    def diagonal(self) -> Params:
        """Exact, from layer statistics; see :class:`funcprecond.DiagonalGGN`."""
        found = self._exact_diagonal(self.labels, self.samples)
        return super().diagonal() if found is None else found

    def _draw(self, batch: Any, generator: torch.Generator | None) -> Any:
        if self.labels != "mc":
            return None
        return draw_labels(self.problem, batch, self.samples, generator)
