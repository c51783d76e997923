r"""The Hessian, the Gauss-Newton matrix and the Fisher matrix of a loss on data, as operators.

On one batch, the first product runs the model and keeps its graph, so that each further product
costs 0.9 to 2.2 gradients. On many batches, every product is one pass over the data and runs the
model anew on each batch. The matrix is that of the loss over all the data, however they are split
into batches. With a mean loss, which on batch b is :math:`c_b \sum_n \ell_n`, the matrices of the
batches are averaged with weights :math:`1 / c_b`.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.examples import CoupledExamples
from funcprecond.curvature.fisher import draw_labels, fisher_form, fisher_product, fisher_rows
from funcprecond.linalg.treemath import wide_dot
from funcprecond.losses import Loss
from funcprecond.losses.base import Labels, check_labels
from funcprecond.operators.data import (
    check_data,
    check_repeats,
    fingerprint,
    mean_over,
    seed_of,
    seeded,
)
from funcprecond.operators.diagonal import exact_diagonal
from funcprecond.operators.operator import Operator
from funcprecond.operators.vector_stacks import in_chunks, stack, unstack
from funcprecond.problems import Problem
from funcprecond.tracing import is_eager, is_traced
from funcprecond.tree import Buffers, Params

__all__ = ["GGN", "Fisher", "Hessian"]


@dataclasses.dataclass(frozen=True, eq=False)
class _OnData(Operator):
    """The base class of the curvature matrices of a problem's loss; see :class:`GGN`."""

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
        # The model runs once per batch for all vectors.
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
        """The loss over all the data, a 0-d tensor. Costs one pass over the data."""
        return self._over_data(lambda e, _: {"": e.loss})[""]

    def gradient(self) -> Params:
        """The gradient of the loss over all the data. Costs one gradient."""
        return self._over_data(lambda e, _: e.grads)

    @abc.abstractmethod
    def _product(self, evaluation: Evaluation, vector: Params, noise: Any) -> Params:
        """The matrix of one batch times a vector."""

    def _form(self, evaluation: Evaluation, vector: Params, noise: Any) -> Tensor:
        """``v · C v`` for the matrix C of one batch."""
        return wide_dot(vector, self._product(evaluation, vector, noise))

    def _draw(self, batch: Any, generator: torch.Generator | None) -> Any:
        """The random numbers that the products on a batch need, apart from dropout masks."""
        return None

    def _over_data(self, of: Callable[[Evaluation, Any], Params]) -> Params:
        """Compute a value of each batch, and combine them into the value of all the data."""
        if self.batches is None:
            return of(*self._opened())
        return mean_over(self._parts(of))

    def _parts(
        self, of: Callable[[Evaluation, Any], Params]
    ) -> Iterator[tuple[Evaluation, Params]]:
        """The evaluation and the value of each batch, and a check that passes repeat the data."""
        seen, traced, e = [], is_traced(), None
        for i, batch in enumerate(self._pass()):
            if not traced:
                seen.append(fingerprint(batch))
            e, noise = self._open(batch, i)
            yield e, of(e, noise)
        kept: dict = self._kept  # pyright: ignore[reportAttributeAccessIssue]
        if seen and e is not None:
            check_repeats(kept.setdefault("seen", seen), seen, e, self.generator is not None)

    def _pass(self) -> Iterable[Any]:
        batches: Any = self.batches
        return batches if self.progress is None else self.progress(batches)

    def _opened(self) -> tuple[Evaluation, Any]:
        """The evaluation of the single batch, and the random numbers of :meth:`_draw`.

        They are made once and kept. The exception is a call inside of a transform on an operator
        that was made outside of it, because the evaluation must not outlive the transform.
        """
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
        """The diagonal from layer statistics, or None where these do not determine it.

        They do not if the model couples the examples of a batch, if the loss is not a likelihood
        (unless the labels are "empirical"), or if the per-sample gradients of a parameter that is
        in no layer cannot be computed.
        """
        likelihood = type(self.problem.loss).exact is not Loss.exact
        if not (likelihood or labels == "empirical"):
            return None
        seed = self._seed  # pyright: ignore[reportAttributeAccessIssue]
        data = (self.batch, None if self.batches is None else self._pass())
        rest = (labels, samples, self.buffers, seed)
        try:
            return exact_diagonal(self.problem, self.params, *data, *rest)
        except (CoupledExamples, RuntimeError):
            # The rows of the matrix are not those of single examples.
            return None


class Hessian(_OnData):
    """The Hessian of a problem's loss, on one batch or on many.

    A product costs 1.3 to 2.2 gradients on one batch, whose graph is kept, and 2.1 to 3.3 gradients
    per batch on many.

    Attributes:
        problem, params: the problem, and the parameters at which its loss is differentiated.
        batch: one batch. Pass either this or ``batches``.
        batches: an iterable of batches that can be read repeatedly, such as a list or a
            ``DataLoader``. A product raises ValueError if a pass over it gives other batches than
            the first and therefore another matrix, as ``shuffle=True`` does with random numbers or
            a model that couples the examples.
        progress: wraps ``batches`` in each pass over them, such as ``tqdm.tqdm`` or
            ``rich.progress.track``.
        buffers: the model's buffers; those of the problem by default.
        generator: seeds the dropout masks once, so that all products use the same masks.
        chunk_size: the number of vectors of a stack that are multiplied at a time, see
            :meth:`matmat`.

    Raises:
        ValueError: neither or both of ``batch`` and ``batches`` are given.
        TypeError: ``batches`` is an iterator, which can be read only once.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(2, 1, bias=False), fp.losses.mse)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> fp.Hessian(problem, problem.params, batch) @ {"weight": torch.ones(1, 2)}
        {'weight': tensor([[1., 4.]])}
    """

    def _product(self, evaluation: Evaluation, vector: Params, noise: Any) -> Params:
        return evaluation.hvp(vector)


class GGN(_OnData):
    """The Gauss-Newton matrix ``J^T H_L J`` of a problem's loss, on one batch or on many.

    J is the Jacobian of the model's outputs in the parameters, and H_L the Hessian of the loss in
    the outputs. A product costs 0.9 to 1.4 gradients on one batch, whose graph is kept, and 1.6 to
    2 gradients per batch on many. A quadratic form needs only ``J v`` and costs about half of that.

    Attributes:
        problem, params: the problem, and the parameters at which its loss is differentiated.
        batch: one batch. Pass either this or ``batches``.
        batches: an iterable of batches that can be read repeatedly, such as a list or a
            ``DataLoader``. A product raises ValueError if a pass over it gives other batches than
            the first and therefore another matrix, as ``shuffle=True`` does with random numbers or
            a model that couples the examples.
        progress: wraps ``batches`` in each pass over them, such as ``tqdm.tqdm`` or
            ``rich.progress.track``.
        buffers: the model's buffers; those of the problem by default.
        generator: seeds the dropout masks once, so that all products use the same masks.
        chunk_size: the number of vectors of a stack that are multiplied at a time, see
            :meth:`matmat`.

    Raises:
        ValueError: neither or both of ``batch`` and ``batches`` are given.
        TypeError: ``batches`` is an iterator, which can be read only once.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(2, 1, bias=False), fp.losses.mse)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> fp.GGN(problem, problem.params, batch).to_dense()
        tensor([[1., 0.],
                [0., 4.]])
    """

    def _product(self, evaluation: Evaluation, vector: Params, noise: Any) -> Params:
        return evaluation.ggn_mv(vector)

    def _form(self, evaluation: Evaluation, vector: Params, noise: Any) -> Tensor:
        return evaluation.ggn_form(vector)

    def diagonal(self) -> Params:
        """The exact diagonal.

        Returns:
            The diagonal, shaped like the parameters. If the loss is a likelihood and the model does
            not couple the examples, it costs as much as :class:`funcprecond.DiagonalGGN`; otherwise
            it costs P quadratic forms.
        """
        found = self._exact_diagonal("exact")
        return super().diagonal() if found is None else found


@dataclasses.dataclass(frozen=True, eq=False)
class Fisher(_OnData):
    """The Fisher matrix ``c Σ_vn g_vn g_vn^T`` of a problem's likelihood, on one batch or on many.

    ``g_vn`` is the per-sample gradient of example n at the v-th of its labels, which ``labels``
    selects, and c is the loss's reduction constant. With ``labels="exact"`` the matrix equals the
    Gauss-Newton matrix, and its products cost the same. With other labels, and if the layers cover
    every parameter, a product is computed from the layers' inputs and output gradients, and costs
    0.5 to 0.9 gradients per label on one batch.

    Attributes:
        problem, params: the problem, and the parameters at which its loss is differentiated.
        batch: one batch. Pass either this or ``batches``.
        batches: an iterable of batches that can be read repeatedly, such as a list or a
            ``DataLoader``. A product raises ValueError if a pass over it gives other batches than
            the first and therefore another matrix, as ``shuffle=True`` does with random numbers or
            a model that couples the examples.
        progress: wraps ``batches`` in each pass over them, such as ``tqdm.tqdm`` or
            ``rich.progress.track``.
        buffers: the model's buffers; those of the problem by default.
        generator: seeds the sampled labels and the dropout masks once, so that all products use the
            same ones.
        chunk_size: the number of vectors of a stack that are multiplied at a time, see
            :meth:`matmat`.
        labels: "exact" for the expectation over the labels that the model predicts; "mc" for
            labels sampled from the prediction, an unbiased estimate; "empirical" for the labels of
            the data.
        samples: the number of sampled labels per term of the loss, with "mc".

    Raises:
        ValueError: neither or both of ``batch`` and ``batches`` are given, or ``labels`` or
            ``samples`` is out of range.
        TypeError: ``batches`` is an iterator, which can be read only once. The first product raises
            it if the loss is not a known likelihood and ``labels`` is not "empirical".

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(2, 1, bias=False), fp.losses.mse)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> fp.Fisher(problem, problem.params, batch).trace()
        tensor(5.)
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
        kept: list[Any] = []

        def rows() -> Any:
            # Compilers cannot trace functools.cache.
            if not kept:
                kept.append(fisher_rows(evaluation, self.labels, drawn))
            return kept[0]

        return evaluation, (drawn, rows)

    @property
    def _layers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.labels != "exact" and is_eager((self.params, self.buffers, self.batch))

    def diagonal(self) -> Params:
        """The exact diagonal of the matrix with the chosen labels.

        Returns:
            The diagonal, shaped like the parameters. If the model does not couple the examples, it
            costs as much as :class:`funcprecond.DiagonalGGN`; otherwise it costs P quadratic forms.
        """
        found = self._exact_diagonal(self.labels, self.samples)
        return super().diagonal() if found is None else found

    def _draw(self, batch: Any, generator: torch.Generator | None) -> Any:
        if self.labels != "mc":
            return None
        return draw_labels(self.problem, batch, self.samples, generator)
