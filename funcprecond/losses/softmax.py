"""Softmax cross-entropy."""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.linalg import random
from funcprecond.losses.base import Loss, Reduction, one_term

__all__ = ["CrossEntropy"]


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

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self._check(outputs, targets)
        soft = targets.is_floating_point()
        return F.cross_entropy(
            self._rows(outputs),
            self._rows(targets) if soft else targets.reshape(-1),
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def _rows(self, x: Tensor) -> Tensor:
        """Reshape to (terms, C)."""
        if x.ndim == 2:
            return x
        return x.movedim(self.class_dim, -1).reshape(-1, x.shape[self.class_dim])

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.reduction == "sum":
            return outputs.new_ones(())
        if targets.is_floating_point():
            return outputs.new_ones(()) / (outputs.numel() // outputs.shape[self.class_dim])
        kept = (targets != self.ignore_index).to(outputs.dtype)
        if self.weight is not None:
            kept = kept * self.weight.to(outputs)[self._labels(targets)]
        return 1 / kept.sum()

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        p, u = self._probabilities(outputs), vector.movedim(self.class_dim, -1)
        weight = self._term_weights(outputs, targets) * self.constant(outputs, targets)
        product = weight * (p * u - p * (p * u).sum(-1, keepdim=True))
        return product.movedim(-1, self.class_dim)

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
        # This inverts the cumulative distribution. The last class also gets the part of the unit
        # interval that rounding leaves uncovered.
        below = (p.cumsum(-1)[..., :-1] <= noise.to(p.dtype).unsqueeze(-1)).sum(-1)
        onehot = torch.arange(p.shape[-1], device=p.device) == below.unsqueeze(-1)
        scale = (self._term_weights(outputs, targets) / noise.shape[0]).sqrt()
        return (scale * (p - onehot.to(p.dtype))).movedim(-1, self._stacked_class_dim(outputs))

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        p = self._probabilities(outputs)
        scale = self._term_weights(outputs, targets).sqrt()
        classes = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        for term in one_term(p.shape[1:-1], p):
            for c in range(p.shape[-1]):
                column = scale * p[..., c : c + 1].sqrt() * (classes[c] - p)
                yield (column * term.unsqueeze(-1)).movedim(-1, self.class_dim)

    def _stacked_class_dim(self, outputs: Tensor) -> int:
        return self.class_dim if self.class_dim < 0 else self.class_dim + 1

    def _probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(self.class_dim, -1).softmax(-1)

    def _labels(self, targets: Tensor) -> Tensor:
        return torch.where(targets == self.ignore_index, 0, targets)

    def _term_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The weight (..., 1) of the Hessian ``diag(p) - p p^T`` of each term."""
        if targets.is_floating_point():
            labels = targets.movedim(self.class_dim, -1).to(outputs.dtype)
            smooth, classes = self.label_smoothing, labels.shape[-1]
            labels = (1 - smooth) * labels + smooth / classes
            if self.weight is not None:
                labels = labels * self.weight.to(outputs)
            return labels.sum(-1, keepdim=True)
        kept = (targets != self.ignore_index).to(outputs.dtype)
        if self.weight is not None:
            weight = self.weight.to(outputs)
            own = weight[self._labels(targets)]
            kept = kept * ((1 - self.label_smoothing) * own + self.label_smoothing * weight.mean())
        return kept.unsqueeze(-1)

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        expected = list(outputs.shape)
        if not targets.is_floating_point():
            del expected[self.class_dim]
        if list(targets.shape) != expected:
            msg = (
                f"cross_entropy: outputs {tuple(outputs.shape)} with classes on axis "
                f"{self.class_dim} expect targets {tuple(expected)}, not {tuple(targets.shape)}; "
                "for the layout (N, C, ...) of torch, use fp.losses.CrossEntropy(class_dim=1)"
            )
            raise ValueError(msg)
