"""Losses of real targets: squared error, Huber's, and a Gaussian with a predicted variance."""

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.linalg import random
from funcprecond.losses.base import Loss, Reduction, entries, one_term, same_shape

__all__ = ["MSE", "GaussianNLL", "Huber"]


@dataclasses.dataclass(frozen=True, eq=False)
class MSE(Loss):
    """Squared error, ``(outputs - targets)^2``, averaged or summed over all entries, as torch does.

    As a likelihood: a Gaussian of unit variance, ``c = 2 / numel`` for the mean and 2 for the sum.
    """

    reduction: Reduction = "mean"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        same_shape("mse", outputs, targets)
        error = (outputs - targets).square()
        return error.mean() if self.reduction == "mean" else error.sum()

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.new_full((), 2 / entries(outputs, self.reduction))

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        return self.constant(outputs, targets) * vector

    def label_noise(
        self, targets: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        shape = (samples, *targets.shape)
        return random.normal(shape, generator, dtype=targets.dtype, device=targets.device)

    def sampled(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        return noise.to(outputs.dtype) / math.sqrt(noise.shape[0])

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        for term in one_term(outputs.shape[1:], outputs):
            yield term.expand_as(outputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Huber(Loss):
    """Huber's loss, averaged or summed over all entries, as ``torch.nn.HuberLoss``.

    ``e^2 / 2`` for an error within ``delta``, ``delta (|e| - delta / 2)`` beyond. Its Hessian in
    the outputs is 1 within and 0 beyond: an outlier has a gradient and no curvature. The Fisher
    matrix ("exact" and "mc") is this Gauss-Newton matrix, that of a unit Gaussian over the entries
    within; that of Huber's own density would be blind to which entries are outliers.

    Attributes:
        delta: where the quadratic ends, positive.
        reduction: "mean" or "sum", over all entries.
    """

    delta: float = 1.0
    reduction: Reduction = "mean"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        same_shape("huber", outputs, targets)
        return F.huber_loss(outputs, targets, self.reduction, self.delta)

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.new_full((), 1 / entries(outputs, self.reduction))

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        return self.constant(outputs, targets) * self._within(outputs, targets) * vector

    def label_noise(
        self, targets: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        shape = (samples, *targets.shape)
        return random.normal(shape, generator, dtype=targets.dtype, device=targets.device)

    def sampled(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        return self._within(outputs, targets) * noise.to(outputs.dtype) / math.sqrt(noise.shape[0])

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        within = self._within(outputs, targets)
        for term in one_term(outputs.shape[1:], outputs):
            yield within * term

    def _within(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).abs() <= self.delta).to(outputs.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianNLL(Loss):
    """A Gaussian whose variance the model predicts too, as ``torch.nn.GaussianNLLLoss``.

    Outputs (..., 2 D) are D means, then D variances, ``torch.cat([mean, variance], -1)``; targets
    are (..., D). The loss is ``(log v + (y - m)^2 / v) / 2``, averaged or summed over the targets.

    Its Hessian in the outputs is indefinite, so the Gauss-Newton matrix has the expected one, the
    Fisher information ``diag(1 / v, 1 / (2 v^2))``. It is the same however the model makes the
    variance positive, by ``exp`` or ``softplus``. The Hessian matrix is the loss's own.

    Attributes:
        full: with the constant ``log(2 pi) / 2``.
        eps: smaller variances count as this one, their gradients go through, as in torch.
        reduction: "mean" or "sum", over all entries of the targets.
    """

    full: bool = False
    eps: float = 1e-6
    reduction: Reduction = "mean"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean, variance = self._moments(outputs)
        same_shape("gaussian_nll, means", mean, targets)
        terms = 0.5 * (variance.log() + (targets - mean).square() / variance)
        if self.full:
            terms = terms + 0.5 * math.log(2 * math.pi)
        return terms.mean() if self.reduction == "mean" else terms.sum()

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.new_full((), 1 / entries(targets, self.reduction))

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        return self.constant(outputs, targets) * self._root(outputs).square() * vector

    def label_noise(
        self, targets: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        shape = (samples, *targets.shape)
        return random.normal(shape, generator, dtype=targets.dtype, device=targets.device)

    def sampled(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        _, variance = self._moments(outputs)
        noise = noise.to(outputs.dtype)
        cotangents = [-noise / variance.sqrt(), (1 - noise.square()) / (2 * variance)]
        return torch.cat(cotangents, -1) / math.sqrt(noise.shape[0])

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        root = self._root(outputs)
        for term in one_term(outputs.shape[1:], outputs):
            yield root * term

    def _root(self, outputs: Tensor) -> Tensor:
        """The root of the Fisher information, shaped like the outputs."""
        _, variance = self._moments(outputs)
        return torch.cat([variance.rsqrt(), math.sqrt(0.5) / variance], -1)

    def _moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or outputs.shape[-1] % 2:
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            msg = (
                "gaussian_nll: outputs are the means and the variances along the last axis, "
                f"torch.cat([mean, variance], -1), not {found}"
            )
            raise ValueError(msg)
        mean, variance = outputs.chunk(2, -1)
        # The value of a clamp with the gradient of none.
        return mean, variance + (variance.clamp_min(self.eps) - variance).detach()
