"""The exact diagonal of the Gauss-Newton matrix, without any Jacobian.

For a likelihood it is the Fisher matrix's: the sum of the squared rows that the exact labels'
cotangents are pulled back to, which each layer's inputs and output gradients give entry by entry.
One pull-back to the layers' outputs, a third of a gradient, for each output entry of an example.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.layers.blocks import Layers
from funcprecond.linalg import treemath
from funcprecond.losses.base import Labels, check_labels
from funcprecond.operators.data import check_data, each_batch, mean_over, seed_of, seeded
from funcprecond.operators.operator import Operator
from funcprecond.problems import Problem
from funcprecond.tree import Buffers, Params

__all__ = ["DiagonalGGN", "DiagonalMatrix", "diagonal_of", "exact_diagonal"]


class DiagonalMatrix(Operator):
    """A diagonal.

    Attributes:
        values: shaped like the parameters, in float32 or wider.
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
        """``(C + damping I)^p``."""
        return DiagonalMatrix({k: (d + damping) ** p for k, d in self.values.items()}, self.like)

    def inverse(self, damping: float | Tensor) -> "DiagonalMatrix":
        """``(C + damping I)^-1``."""
        return self.power(-1.0, damping)

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """``log det (C + damping I)``, a 0-d tensor."""
        return (treemath.ravel(self.values) + damping).log().sum()


class DiagonalGGN(DiagonalMatrix):
    """The diagonal of the Gauss-Newton matrix of a problem's loss on data.

    Args:
        problem, params: whose, and where.
        batch, batches: one batch, or an iterable of them that can be gone through again.
        labels: "exact"; "mc" and "empirical" are the diagonals of these Fisher matrices, at a
            fraction of the cost.
        samples: sampled labels for each term, with "mc".
        buffers: the model's buffers; the problem's own by default.
        generator: draws labels and dropout masks.

    Raises:
        TypeError: the loss is not a likelihood that is known.
        ValueError: the model couples the examples of a batch.
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
    """The values of :class:`DiagonalGGN`, with the random numbers of a seed."""
    need = LayerStatistics(labels, samples, per_sample=True)
    if coupling := problem.couples_examples():
        msg = f"the rows are those of single examples, and {coupling} couples them: use eval mode"
        raise ValueError(msg)

    def measured():
        for i, b in enumerate(each_batch(batch, batches)):
            generator = seeded(seed, i)
            noise = need.draw(problem, params, b, generator)
            e = Evaluation(problem, params, b, buffers=buffers, generator=generator, layers=True)
            # The data's labels are one cotangent, and take no gradient besides; several go at once,
            # so that their squares are summed before they meet the inputs'.
            single = labels == "empirical"
            (layers,) = need.each(e, noise) if single else (need.measure(e, noise),)
            yield e, diagonal_of(layers, params)

    return mean_over(measured())


def diagonal_of(layers: Layers, params: Params) -> Params:
    """The diagonal of a measurement that tells the examples apart; zero where nothing is known."""
    found: Params = {}
    for uses in layers.uses.values():
        found |= uses[0].call.diagonal(uses, params)
    found |= layers.others
    return {
        k: found[k] * layers.scale.to(found[k].dtype) if k in found else torch.zeros_like(p)
        for k, p in params.items()
    }
