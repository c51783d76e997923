"""Losses of class labels: softmax cross-entropy, of logits and of log-probabilities."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.linalg import random
from funcprecond.linalg.precision import factor_dtype
from funcprecond.losses.base import Loss, Reduction, check_reduction, check_tensors, one_term

__all__ = ["NLL", "CrossEntropy"]


@dataclasses.dataclass(frozen=True, eq=False)
class CrossEntropy(Loss):
    """Softmax cross-entropy, as in ``torch.nn.CrossEntropyLoss``.

    Outputs (..., C) are logits of C classes, and targets (...) are class indices. Targets may also
    be probabilities, shaped like the outputs. As a likelihood, it is a categorical distribution for
    each term. The constant ``c`` is 1 for the sum, and 1 divided by the number or the total weight
    of the terms for the mean.

    Attributes:
        ignore_index: terms with this target are left out of the sum and the mean.
        label_smoothing: the weight in [0, 1) of the uniform distribution, with which the target is
            mixed.
        weight: the weights (C,) of the classes, or None.
        reduction: "mean" over the terms (weighted, as in torch) or "sum".
        class_dim: the axis of the classes in the outputs. It is -1 by default, and 1 in
            ``torch.nn.CrossEntropyLoss``.

    Example:
        >>> import torch, funcprecond as fp
        >>> value = fp.losses.cross_entropy(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]))
        >>> torch.allclose(value, torch.tensor(2.0).log())
        True
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    weight: Tensor | None = None
    reduction: Reduction = "mean"
    class_dim: int = -1

    def __post_init__(self):
        check_reduction(self.reduction)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        check_classes("cross_entropy", self, outputs, targets, soft=True)
        soft = targets.is_floating_point()
        return F.cross_entropy(
            rows(outputs, self.class_dim),
            rows(targets, self.class_dim) if soft else targets.reshape(-1).long(),
            weight=None if self.weight is None else self.weight.to(outputs),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            terms = outputs.numel() // outputs.shape[self.class_dim]
            divisor = 1 if self.reduction == "sum" else terms
            return outputs.new_ones((), dtype=factor_dtype(outputs)) / divisor
        return class_constant(self, outputs, targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        p, u = self._probabilities(outputs), vector.movedim(self.class_dim, -1)
        weight = self._term_weights(outputs, targets) * self.constant(outputs, targets)
        product = weight * (p * u - p * (p * u).sum(-1, keepdim=True))
        return product.movedim(-1, self.class_dim).to(vector.dtype)

    def label_noise(
        self, targets: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        shape = targets.shape
        if targets.is_floating_point():
            shape = targets.movedim(self.class_dim, -1).shape[:-1]
        return random.uniform(
            (samples, *shape), generator, dtype=torch.float32, device=targets.device
        )

    def sampled(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        p = self._probabilities(outputs)
        scale = (self._term_weights(outputs, targets) / noise.shape[0]).sqrt()
        cotangents = scale * (p - drawn_classes(p, noise))
        return cotangents.movedim(-1, stacked(self.class_dim)).to(outputs.dtype)

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        p = self._probabilities(outputs)
        scale = self._term_weights(outputs, targets).sqrt()
        classes = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        for term in one_term(p.shape[1:-1], p):
            for c in range(p.shape[-1]):
                column = scale * p[..., c : c + 1].sqrt() * (classes[c] - p)
                column = (column * term.unsqueeze(-1)).movedim(-1, self.class_dim)
                yield column.to(outputs.dtype)

    def _probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(self.class_dim, -1).softmax(-1, dtype=factor_dtype(outputs))

    def _term_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The weight (..., 1) of the Hessian ``diag(p) - p p^T`` of each term."""
        dtype = factor_dtype(outputs)
        weight = None if self.weight is None else self.weight.to(outputs.device, dtype)
        if targets.is_floating_point():
            labels = targets.movedim(self.class_dim, -1).to(dtype)
            smooth, classes = self.label_smoothing, labels.shape[-1]
            labels = (1 - smooth) * labels + smooth / classes
            if weight is not None:
                labels = labels * weight
            return labels.sum(-1, keepdim=True)
        own = class_weights(self, outputs, targets)
        if weight is not None:
            kept = targets.long() != self.ignore_index
            own = (1 - self.label_smoothing) * own + self.label_smoothing * weight.mean() * kept
        return own.unsqueeze(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class NLL(Loss):
    """Cross-entropy of log-probabilities, as in ``torch.nn.NLLLoss``.

    Outputs f (..., C) are log-probabilities of C classes, as ``log_softmax`` returns them, and
    targets (...) are class indices. The likelihood and the constant ``c`` are those of
    :class:`CrossEntropy`.

    The loss is linear in the outputs, so that its Hessian is zero there. The Gauss-Newton matrix
    uses its expectation over the labels of the likelihood instead, the Fisher information
    ``diag(exp f)``. Pulled back through ``log_softmax``, it is the Gauss-Newton matrix of
    :class:`CrossEntropy`. The Hessian of the loss in the parameters uses no expectation.

    Attributes:
        ignore_index, weight, reduction, class_dim: see :class:`CrossEntropy`.

    Example:
        >>> import torch, funcprecond as fp
        >>> outputs = torch.zeros(4, 2).log_softmax(-1)
        >>> value = fp.losses.nll(outputs, torch.tensor([0, 1, 1, 0]))
        >>> torch.allclose(value, torch.tensor(2.0).log())
        True
    """

    ignore_index: int = -100
    weight: Tensor | None = None
    reduction: Reduction = "mean"
    class_dim: int = -1

    def __post_init__(self):
        check_reduction(self.reduction)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        check_classes("nll", self, outputs, targets)
        return F.nll_loss(
            rows(outputs, self.class_dim),
            targets.reshape(-1).long(),
            weight=None if self.weight is None else self.weight.to(outputs),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return class_constant(self, outputs, targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        weight = class_weights(self, outputs, targets) * self.constant(outputs, targets)
        product = weight.unsqueeze(self.class_dim) * self._probabilities(outputs) * vector
        return product.to(vector.dtype)

    def label_noise(
        self, targets: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        shape = (samples, *targets.shape)
        return random.uniform(shape, generator, dtype=torch.float32, device=targets.device)

    def sampled(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        p = self._probabilities(outputs).movedim(self.class_dim, -1)
        scale = (class_weights(self, outputs, targets) / noise.shape[0]).sqrt().unsqueeze(-1)
        cotangents = -scale * drawn_classes(p, noise)
        return cotangents.movedim(-1, stacked(self.class_dim)).to(outputs.dtype)

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        weights = class_weights(self, outputs, targets).unsqueeze(self.class_dim)
        root = (weights * self._probabilities(outputs)).sqrt().to(outputs.dtype)
        for term in one_term(outputs.shape[1:], outputs):
            yield root * term

    def _probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.to(factor_dtype(outputs)).exp()


def rows(x: Tensor, class_dim: int) -> Tensor:
    """Reshape to (terms, C)."""
    if x.ndim == 2:
        return x
    return x.movedim(class_dim, -1).reshape(-1, x.shape[class_dim])


def stacked(class_dim: int) -> int:
    """The axis of the classes behind a new first axis."""
    return class_dim if class_dim < 0 else class_dim + 1


def class_weights(loss: CrossEntropy | NLL, outputs: Tensor, targets: Tensor) -> Tensor:
    """The weights of the terms, shaped like the targets: 0 where the target is ignored."""
    # Integers of one byte cannot be compared with every index.
    targets, dtype = targets.long(), factor_dtype(outputs)
    kept = (targets != loss.ignore_index).to(dtype)
    if loss.weight is None:
        return kept
    weight = loss.weight.to(outputs.device, dtype)
    return kept * weight[torch.where(targets == loss.ignore_index, 0, targets)]


def class_constant(loss: CrossEntropy | NLL, outputs: Tensor, targets: Tensor) -> Tensor:
    """The constant ``c`` for targets that are class indices."""
    if loss.reduction == "sum":
        return outputs.new_ones((), dtype=factor_dtype(outputs))
    return 1 / class_weights(loss, outputs, targets).sum()


def drawn_classes(p: Tensor, noise: Tensor) -> Tensor:
    """Classes drawn from probabilities, as vectors that are 1 for the class and 0 elsewhere.

    Args:
        p: (..., C), in float32 or wider.
        noise: (samples, ...), uniform in [0, 1).

    Returns:
        (samples, ..., C), in the dtype of ``p``. A class whose probability is 0 is never drawn.
    """
    # This inverts the cumulative distribution. Where it ends, which rounding can leave a little
    # above or below 1, the last class with a positive probability takes what is left.
    total = p.cumsum(-1)
    bounds = total.masked_fill(total >= total[..., -1:], torch.inf)
    below = (bounds <= noise.to(p.dtype).unsqueeze(-1)).sum(-1)
    return (torch.arange(p.shape[-1], device=p.device) == below.unsqueeze(-1)).to(p.dtype)


def check_classes(
    name: str, loss: CrossEntropy | NLL, outputs: Any, targets: Any, soft: bool = False
) -> None:
    """Raise an error unless the targets are class indices, or probabilities if ``soft``.

    Raises:
        TypeError: one of the two is not a tensor, or the indices are not integers.
        ValueError: the shapes do not fit.
    """
    check_tensors(name, outputs, targets)
    if outputs.ndim < 2 or loss.class_dim % outputs.ndim == 0:
        msg = (
            f"{name}: outputs {tuple(outputs.shape)} with classes on axis {loss.class_dim} have no "
            "axis of examples: axis 0 must count the examples, and another one the classes"
        )
        raise ValueError(msg)
    expected = list(outputs.shape)
    if not (soft and targets.is_floating_point()):
        del expected[loss.class_dim]
    if targets.is_floating_point() and (not soft or targets.ndim == outputs.ndim - 1):
        also = ", or probabilities shaped like the outputs" if soft else ""
        msg = (
            f"{name}: the targets must be class indices of an integer dtype{also}, not "
            f"{targets.dtype} of the shape {tuple(targets.shape)}: pass targets.long()"
        )
        raise TypeError(msg)
    if list(targets.shape) != expected:
        msg = (
            f"{name}: outputs {tuple(outputs.shape)} with classes on axis "
            f"{loss.class_dim} expect targets {tuple(expected)}, not {tuple(targets.shape)}; "
            "for the layout (N, C, ...) of torch, use class_dim=1"
        )
        raise ValueError(msg)
