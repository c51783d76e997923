"""Residuals r and the rows of their Jacobian J: all that least squares needs to know.

The Gauss-Newton matrix is ``J^T J``, and the gradient of the loss is ``m J^T r``, with m = 1 for
residuals and m = 2 for the energy of a wave function, in which J and r are independent of each
other.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.layer_statistics import ExampleRows
from funcprecond.layers.blocks import Layers
from funcprecond.linalg.precision import factor_dtype
from funcprecond.need import Need
from funcprecond.tree import state

__all__ = ["ResidualRows", "Residuals"]


@state
class Residuals:
    """Residuals and their Jacobian.

    Attributes:
        layers: the rows of J, in the form that :class:`funcprecond.representation.Gram` takes.
        residual: r, (R,). It is (0,) if the loss is no sum of squares: then J is a square root of
            the Gauss-Newton matrix, and r is not known.
        multiple: m, a 0-d tensor.
    """

    layers: Layers
    residual: Tensor
    multiple: Tensor


@dataclasses.dataclass(frozen=True)
class ResidualRows(Need):
    """The residuals of the batch, and their Jacobian.

    The measured value is a :class:`Residuals`. A problem of :func:`funcprecond.residuals` has a row
    for each entry of the residual of a point, one of :func:`funcprecond.vmc` a centred row for each
    sample. Any other problem has a row for each entry of the output of an example, and ``J^T J`` is
    its Gauss-Newton matrix.
    """

    layers: ClassVar[bool] = True
    gives: ClassVar[type] = Residuals

    def measure(self, evaluation: Evaluation, noise: Any) -> Residuals:
        found = evaluation.point_rows(list(evaluation.params))
        if found is not None:
            rows, residual, multiple = found
            one = residual.new_ones((), dtype=factor_dtype(residual))
            others = {k: x.unsqueeze(0) for k, x in rows.items()}
            return Residuals(Layers({}, others, one), residual.to(one.dtype), multiple * one)
        layers = _ROWS.measure(evaluation, noise)
        residual = (
            _errors(evaluation) if evaluation.problem.loss.squares else layers.scale.new_zeros(0)
        )
        return Residuals(layers, residual, torch.ones_like(layers.scale))


_ROWS = ExampleRows("exact")


def _errors(evaluation: Evaluation) -> Tensor:
    """The errors times the root of c, in the order of the rows of the exact cotangents."""
    (errors,) = tree.floating(evaluation.cotangents("empirical", ())[0])
    (place,) = evaluation.examples.outputs
    found = []
    for cotangent in evaluation.cotangents("exact", ()):
        own = cotangent * errors
        by_example = own if place is None else place.split(own)
        found.append(by_example.flatten(1).sum(1))
    return evaluation.constant.sqrt() * torch.cat(found)
