"""Losses for real targets: squared error, Huber's loss, and a Gaussian with predicted variance."""

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.linalg import random
from funcprecond.linalg.precision import factor_dtype
from funcprecond.losses.base import Loss, Reduction, check_reduction, entries, matched, one_term

__all__ = ["MSE", "GaussianNLL", "Huber"]


@dataclasses.dataclass(frozen=True, eq=False)
class MSE(Loss):
    """Squared error ``(outputs - targets)^2``, as in ``torch.nn.MSELoss``.

    Targets, of any real dtype, are shaped like the outputs. As a likelihood, it is a Gaussian of
    unit variance for each entry. The constant ``c`` is 2 / numel for the mean and 2 for the sum.

    Attributes:
        reduction: "mean" or "sum", over all entries.

    Example:
        >>> import torch, funcprecond as fp
        >>> fp.losses.MSE()(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
        tensor(5.)
    """

    reduction: Reduction = "mean"
    squares: ClassVar[bool] = True

    def __post_init__(self):
        check_reduction(self.reduction)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets = matched("mse", outputs, targets)
        error = (outputs - targets).square()
        return error.mean() if self.reduction == "mean" else error.sum()

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return entries(outputs, targets, self.reduction, 2)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        return (self.constant(outputs, targets) * vector).to(vector.dtype)

    def label_noise(
        self, targets: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        shape = (samples, *targets.shape)
        return random.normal(shape, generator, dtype=factor_dtype(targets), device=targets.device)

    def sampled(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        return (noise / math.sqrt(noise.shape[0])).to(outputs.dtype)

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        for term in one_term(outputs.shape[1:], outputs):
            yield term.expand_as(outputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Huber(Loss):
    """Huber's loss, as in ``torch.nn.HuberLoss``.

    The loss of an error e is ``e^2 / 2`` if ``|e| <= delta``, and ``delta (|e| - delta / 2)``
    otherwise. Targets are shaped like the outputs. The Hessian in the outputs is 1 for the errors
    within ``delta`` and 0 for the outliers, which have a gradient but no curvature. The constant
    ``c`` is 1 / numel for the mean and 1 for the sum.

    The Fisher matrix ("exact" and "mc") is the Gauss-Newton matrix, that is, the Fisher matrix of a
    Gaussian of unit variance for the entries within ``delta``. The Fisher matrix of Huber's own
    density would not depend on which entries are outliers.

    Attributes:
        delta: the largest error for which the loss is quadratic; positive.
        reduction: "mean" or "sum", over all entries.

    Example:
        >>> import torch, funcprecond as fp
        >>> loss = fp.losses.Huber(delta=1.0, reduction="sum")
        >>> loss(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2))
        tensor(2.6250)
    """

    delta: float = 1.0
    reduction: Reduction = "mean"

    def __post_init__(self):
        check_reduction(self.reduction)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets = matched("huber", outputs, targets)
        return F.huber_loss(outputs, targets, self.reduction, self.delta)

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return entries(outputs, targets, self.reduction)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        within = self._within(outputs, targets)
        return (self.constant(outputs, targets) * within * vector).to(vector.dtype)

    def label_noise(
        self, targets: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        shape = (samples, *targets.shape)
        return random.normal(shape, generator, dtype=factor_dtype(targets), device=targets.device)

    def sampled(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        cotangents = self._within(outputs, targets) * noise / math.sqrt(noise.shape[0])
        return cotangents.to(outputs.dtype)

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        within = self._within(outputs, targets)
        for term in one_term(outputs.shape[1:], outputs):
            yield within * term

    def _within(self, outputs: Tensor, targets: Tensor) -> Tensor:
        f, y = matched("huber", outputs, targets)
        return ((f - y).abs() <= self.delta).to(outputs.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianNLL(Loss):
    """A Gaussian whose mean and variance the model predicts, as in ``torch.nn.GaussianNLLLoss``.

    Outputs (..., 2 D) are D means m followed by D variances v, ``torch.cat([mean, variance], -1)``.
    Targets y are (..., D). The loss of each entry is ``(log v + (y - m)^2 / v) / 2``. The constant
    ``c`` is 1 / numel of the targets for the mean and 1 for the sum.

    The Hessian in the outputs is indefinite, so the Gauss-Newton matrix uses its expectation, the
    Fisher information ``diag(1 / v, 1 / (2 v^2))``. The matrix does not depend on how the model
    makes the variance positive, such as with ``exp`` or ``softplus``. The Hessian of the loss uses
    no expectation.

    Attributes:
        full: whether to include the constant ``log(2 pi) / 2``.
        eps: the least variance. Smaller variances are replaced by it in the value of the loss, and
            their gradients pass through, as in torch.
        reduction: "mean" or "sum", over all entries of the targets.

    Example:
        >>> import torch, funcprecond as fp
        >>> means, variances = torch.zeros(4, 2), torch.ones(4, 2)
        >>> fp.losses.gaussian_nll(torch.cat([means, variances], -1), torch.ones(4, 2))
        tensor(0.5000)
    """

    full: bool = False
    eps: float = 1e-6
    reduction: Reduction = "mean"

    def __post_init__(self):
        check_reduction(self.reduction)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean, variance = self._moments(outputs)
        mean, targets = matched("gaussian_nll, means", mean, targets)
        terms = 0.5 * (variance.log() + (targets - mean).square() / variance)
        if self.full:
            terms = terms + 0.5 * math.log(2 * math.pi)
        return terms.mean() if self.reduction == "mean" else terms.sum()

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return entries(outputs, targets, self.reduction)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        product = self.constant(outputs, targets) * self._root(outputs).square() * vector
        return product.to(vector.dtype)

    def label_noise(
        self, targets: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        shape = (samples, *targets.shape)
        return random.normal(shape, generator, dtype=factor_dtype(targets), device=targets.device)

    def sampled(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        _, variance = self._moments(outputs.to(factor_dtype(outputs)))
        cotangents = [-noise / variance.sqrt(), (1 - noise.square()) / (2 * variance)]
        return (torch.cat(cotangents, -1) / math.sqrt(noise.shape[0])).to(outputs.dtype)

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        root = self._root(outputs).to(outputs.dtype)
        for term in one_term(outputs.shape[1:], outputs):
            yield root * term

    def _root(self, outputs: Tensor) -> Tensor:
        """The square root of the Fisher information, shaped like the outputs, in full precision."""
        _, variance = self._moments(outputs.to(factor_dtype(outputs)))
        return torch.cat([variance.rsqrt(), math.sqrt(0.5) / variance], -1)

    def _moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or outputs.shape[-1] % 2:
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            msg = (
                "gaussian_nll: outputs must be the means and the variances along the last axis, "
                f"torch.cat([mean, variance], -1), not {found}"
            )
            raise ValueError(msg)
        mean, variance = outputs.chunk(2, -1)
        # The value is that of a clamp, and the gradient is that of no clamp.
        return mean, variance + (variance.clamp_min(self.eps) - variance).detach()
