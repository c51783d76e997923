"""Tensor normal covariances: one for each axis of a parameter, vectors included."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from funcprecond.curvature.sampled_gradient import SampledGradients
from funcprecond.linalg.axes import mode_gram
from funcprecond.linalg.precision import factor_dtype
from funcprecond.linalg.treemath import scalar_like
from funcprecond.representation.average import Average, Decay
from funcprecond.tree import Params, state

__all__ = ["TensorNormal", "long_axes"]

Factors = dict[str, tuple[Tensor, ...]]


@state
class TensorNormal:
    """``H_i = E C_i(D)`` for the axes i longer than 1 of gradients D of a parameter.

    If the covariance of D is a Kronecker product, it is that of the :meth:`factors`, which have its
    trace in any case.

    Attributes:
        average: over the measurements, for each parameter a tuple of (n_i, n_i) matrices.
    """

    average: Average

    accepts: ClassVar[type] = SampledGradients

    @classmethod
    def init(cls, params: Params) -> "TensorNormal":
        """Zero."""
        total = {
            k: tuple(p.new_zeros((n, n), dtype=factor_dtype(p)) for n in long_axes(p.shape))
            for k, p in params.items()
        }
        return cls(Average(total, scalar_like(params)))

    def accumulate(self, value: SampledGradients, decay: Decay) -> "TensorNormal":
        """Take in gradients at sampled labels."""
        found = {}
        for name, factors in self.average.total.items():
            d = value.grads[name].to(factors[0].dtype)
            d = d.reshape(d.shape[0], *(len(x) for x in factors))
            found[name] = tuple(mode_gram(d, axis) for axis in range(1, d.ndim))
        return TensorNormal(self.average.include(found, decay))

    def factors(self) -> Factors:
        """``U_i = H_i / (c^(k-1) Π_{j≠i} n_j)``, all of mean eigenvalue c, the k-th root of D's."""
        return {k: normalised(h) for k, h in self.average.value().items()}


def normalised(covariances: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The factors U_i of covariances H_i that all have one trace."""
    k, sizes = len(covariances), [len(h) for h in covariances]
    entries = math.prod(sizes)
    mean = covariances[0].trace() / entries
    # The clamp is for a gradient of zero.
    c = mean.clamp_min(torch.finfo(mean.dtype).tiny) ** (1 / k)
    return tuple(
        h / (c ** (k - 1) * (entries // n)) for h, n in zip(covariances, sizes, strict=True)
    )


def long_axes(shape: torch.Size) -> tuple[int, ...]:
    """The lengths of the axes longer than 1; a scalar is a vector of one entry."""
    return tuple(n for n in shape if n > 1) or (1,)
