"""The exact diagonal of the Gauss-Newton matrix, computed without a Jacobian.

For a likelihood the Gauss-Newton matrix is the Fisher matrix, so its diagonal is the sum of the
squared per-sample gradients over the cotangents of the exact labels. Each layer's inputs and output
gradients determine that sum entry by entry. It takes one pull-back to the layers' outputs, a third
of a gradient, per output entry of an example.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.layer_statistics import ExampleRows
from funcprecond.layers.blocks import Layers
from funcprecond.linalg import treemath
from funcprecond.losses.base import Labels, check_labels
from funcprecond.operators.data import check_data, each_batch, mean_over, seed_of, seeded
from funcprecond.operators.operator import Operator
from funcprecond.problems import Problem
from funcprecond.tree import Buffers, Params

__all__ = ["DiagonalGGN", "DiagonalMatrix", "diagonal_of", "exact_diagonal"]


class DiagonalMatrix(Operator):
    """A diagonal matrix.

    Args:
        values: the diagonal, shaped like the parameters, in float32 or wider.
        like: tensors with the shapes, dtypes and devices of the vectors.

    Example:
        >>> import torch, funcprecond as fp
        >>> values = {"w": torch.tensor([1.0, 3.0])}
        >>> fp.operators.DiagonalMatrix(values, values).inverse(damping=1.0).diagonal()
        {'w': tensor([0.5000, 0.2500])}
    """

    def __init__(self, values: Params, like: Params):
        self.values, self.like = values, like

    def matvec(self, vector: Params) -> Params:
        return {k: (self.values[k] * v).to(v.dtype) for k, v in vector.items()}

    def matmat(self, vectors: Params, chunk_size: int | None = None) -> Params:
        return self.matvec(vectors)

    def _block(self, names) -> Operator:
        return DiagonalMatrix({k: self.values[k] for k in names}, {k: self.like[k] for k in names})

    def diagonal(self) -> Params:
        return self.values

    def frobenius_norm(self) -> Tensor:
        return treemath.norm(self.values)

    def power(self, p: float, damping: float | Tensor = 0.0) -> "DiagonalMatrix":
        """``(C + damping I)^p``.

        Args:
            p: the exponent.
            damping: the multiple of the identity that is added to C.

        Returns:
            A diagonal matrix. Costs a few operations per entry.
        """
        return DiagonalMatrix({k: (d + damping) ** p for k, d in self.values.items()}, self.like)

    def inverse(self, damping: float | Tensor) -> "DiagonalMatrix":
        """``(C + damping I)^-1``.

        Args:
            damping: the multiple of the identity that is added to C.

        Returns:
            A diagonal matrix. Costs a few operations per entry.
        """
        return self.power(-1.0, damping)

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """``log det (C + damping I)``.

        Args:
            damping: the multiple of the identity that is added to C.

        Returns:
            A 0-d tensor.
        """
        return (treemath.ravel(self.values) + damping).log().sum()


class DiagonalGGN(DiagonalMatrix):
    """The exact diagonal of the Gauss-Newton matrix of a problem's loss, or of a Fisher matrix.

    It is computed when the object is made. This costs one forward pass, and pull-backs to the
    layers' outputs of a third of a gradient each: one per output entry of an example with
    ``labels="exact"``, ``samples`` with "mc", and one with "empirical".

    Args:
        problem, params: the problem, and the parameters at which its loss is differentiated.
        batch: one batch. Pass either this or ``batches``.
        batches: an iterable of batches that can be read repeatedly, such as a list or a
            ``DataLoader``.
        labels: "exact" for the Gauss-Newton matrix; "mc" or "empirical" for the Fisher matrix with
            labels sampled from the model's prediction, or with the labels of the data.
        samples: the number of sampled labels per term of the loss, with "mc".
        buffers: the model's buffers; those of the problem by default.
        generator: draws the sampled labels and the dropout masks.

    Raises:
        TypeError: the loss is not a known likelihood and ``labels`` is not "empirical", or
            ``batches`` is an iterator.
        ValueError: the model couples the examples of a batch, ``labels`` or ``samples`` is out of
            range, neither or both of ``batch`` and ``batches`` are given, or random numbers are
            needed and there is no generator.
        RuntimeError: some parameter is in no layer, and ``vmap`` cannot compute its per-sample
            gradients.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(2, 1, bias=False), fp.losses.mse)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> fp.DiagonalGGN(problem, problem.params, batch).diagonal()
        {'weight': tensor([[1., 4.]])}
    """

    def __init__(
        self,
        problem: Problem,
        params: Params,
        batch: Any = None,
        *,
        batches: Iterable[Any] | None = None,
        labels: Labels = "exact",
        samples: int = 1,
        buffers: Buffers | None = None,
        generator: torch.Generator | None = None,
    ):
        check_data(batch, batches)
        check_labels(labels, samples)
        data, seed = (batch, batches), seed_of(generator)
        values = exact_diagonal(problem, params, *data, labels, samples, buffers, seed)
        super().__init__(values, params)


def exact_diagonal(
    problem: Problem,
    params: Params,
    batch: Any,
    batches: Iterable[Any] | None,
    labels: Labels,
    samples: int,
    buffers: Buffers | None,
    seed: int | None,
) -> Params:
    """The values of :class:`DiagonalGGN`, with random numbers drawn from a seed."""
    need = ExampleRows(labels, samples, others="diagonal")

    def measured():
        for i, b in enumerate(each_batch(batch, batches)):
            generator = seeded(seed, i)
            noise = need.draw(problem, params, b, generator)
            e = Evaluation(problem, params, b, buffers=buffers, generator=generator, layers=True)
            # "empirical" has one cotangent, and each() does not compute the gradient that measure()
            # would. Several cotangents are measured together, so that their squares are summed
            # before the product with the squared inputs.
            single = labels == "empirical"
            (layers,) = need.each(e, noise) if single else (need.measure(e, noise),)
            yield e, diagonal_of(layers, params)

    return mean_over(measured())


def diagonal_of(layers: Layers, params: Params) -> Params:
    """The diagonal of the curvature matrix that was measured.

    Args:
        layers: the layers' inputs and output gradients, whose first axes must be the examples.
        params: the parameters.

    Returns:
        The diagonal, shaped like the parameters; zero for a parameter without a measurement.
    """
    found: Params = {}
    for uses in layers.uses.values():
        found |= uses[0].call.diagonal(uses, params)
    found |= layers.others
    return {
        k: found[k] * layers.scale.to(found[k].dtype) if k in found else torch.zeros_like(p)
        for k, p in params.items()
    }
