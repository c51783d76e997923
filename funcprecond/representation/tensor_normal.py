"""The covariances of a tensor normal model: one per axis of a parameter, also of a vector."""

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

    C_i(D) is the Gram matrix of D along axis i. If the covariance of D is a Kronecker product, it
    is the product of the :meth:`factors`; in any case the product has the trace of the covariance
    (Ren & Goldfarb, arXiv 2106.02925).

    Attributes:
        average: the average of the measurements, a tuple of (n_i, n_i) matrices for each parameter.
    """

    average: Average

    accepts: ClassVar[type] = SampledGradients

    @classmethod
    def init(cls, params: Params) -> "TensorNormal":
        """Covariances of zeros.

        Args:
            params: the parameters.

        Returns:
            The representation.
        """
        total = {
            k: tuple(p.new_zeros((n, n), dtype=factor_dtype(p)) for n in long_axes(p.shape))
            for k, p in params.items()
        }
        return cls(Average(total, scalar_like(params)))

    def accumulate(self, value: SampledGradients, decay: Decay) -> "TensorNormal":
        """Include a measurement.

        Args:
            value: gradients at sampled labels.
            decay: see :mod:`funcprecond.representation.average`.

        Returns:
            The new representation. Costs one Gram matrix per axis.
        """
        found = {}
        for name, factors in self.average.total.items():
            d = value.grads[name].to(factors[0].dtype)
            d = d.reshape(d.shape[0], *(len(x) for x in factors))
            found[name] = tuple(mode_gram(d, axis) for axis in range(1, d.ndim))
        return TensorNormal(self.average.include(found, decay))

    def factors(self) -> Factors:
        """The factors ``U_i = H_i / (c^(k-1) Π_{j≠i} n_j)``, which all have the mean eigenvalue c.

        c is the k-th root of the mean eigenvalue of the covariance of D, for a parameter with k
        axes.
        """
        return {k: normalized(h) for k, h in self.average.value().items()}


def normalized(covariances: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The factors U_i of covariances H_i, which all have the same trace."""
    k, sizes = len(covariances), [len(h) for h in covariances]
    entries = math.prod(sizes)
    mean = covariances[0].trace() / entries
    # The clamp avoids a division by zero if the gradient is zero.
    c = mean.clamp_min(torch.finfo(mean.dtype).tiny) ** (1 / k)
    return tuple(
        h / (c ** (k - 1) * (entries // n)) for h, n in zip(covariances, sizes, strict=True)
    )


def long_axes(shape: torch.Size) -> tuple[int, ...]:
    """The lengths of the axes longer than 1; a scalar counts as a vector of one entry."""
    return tuple(n for n in shape if n > 1) or (1,)
