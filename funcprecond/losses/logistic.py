"""Binary cross-entropy with logits."""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.linalg import random
from funcprecond.losses.base import Loss, Reduction, entries, one_term, same_shape

__all__ = ["BCEWithLogits"]


@dataclasses.dataclass(frozen=True, eq=False)
class BCEWithLogits(Loss):
    """Binary cross-entropy of logits, as in ``torch.nn.BCEWithLogitsLoss``.

    Outputs are logits, and targets are labels 0 and 1 or probabilities, shaped like the outputs. As
    a likelihood, it is a Bernoulli distribution for each entry. The constant ``c`` is 1 / numel for
    the mean and 1 for the sum.

    Attributes:
        pos_weight: the weight of the positive class, broadcast against the outputs, or None.
        reduction: "mean" or "sum", over all entries.

    Example:
        >>> import torch, funcprecond as fp
        >>> loss = fp.losses.BCEWithLogits(reduction="sum")
        >>> value = loss(torch.zeros(2, 3), torch.ones(2, 3))
        >>> torch.allclose(value, 6 * torch.tensor(2.0).log())
        True
    """

    pos_weight: Tensor | None = None
    reduction: Reduction = "mean"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        same_shape("bce_with_logits", outputs, targets)
        return F.binary_cross_entropy_with_logits(
            outputs, targets, pos_weight=self.pos_weight, reduction=self.reduction
        )

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.new_full((), 1 / entries(outputs, self.reduction))

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        return self.constant(outputs, targets) * self._curvature(outputs, targets) * vector

    def label_noise(
        self, targets: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        shape = (samples, *targets.shape)
        return random.uniform(shape, generator, dtype=torch.float32, device=targets.device)

    def sampled(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        q = outputs.sigmoid()
        scale = (self._weights(outputs, targets) / noise.shape[0]).sqrt()
        return scale * (q - (noise.to(q.dtype) < q).to(q.dtype))

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        root = self._curvature(outputs, targets).sqrt()
        for term in one_term(outputs.shape[1:], outputs):
            yield root * term

    def _weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.pos_weight is None:
            return torch.ones_like(outputs)
        return 1 + (self.pos_weight.to(outputs) - 1) * targets

    def _curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        q = outputs.sigmoid()
        return self._weights(outputs, targets) * q * (1 - q)
